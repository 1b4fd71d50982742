//! How many threads libtorch uses on the CPU.

use std::{num::NonZeroUsize, thread};

/// Above this many threads the layers of the models here are too small to be cut up further.
const MOST: usize = 16;

/// Sets the threads inside one operation, for the whole process, and returns their number.
///
/// Without a wish it takes what this process may use (its affinity and quota, not the machine's cores). libtorch's second
/// pool, for operations beside each other, starts only when it is used, and nothing here uses it. To be called before the
/// first operation.
pub fn use_threads(wanted: Option<NonZeroUsize>) -> usize {
    let available = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = wanted.map_or(available.min(MOST), NonZeroUsize::get);
    tch::set_num_threads(threads as i32);
    threads
}
