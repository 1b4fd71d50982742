//! CUDA at run time: streams, events, graphs, the allocator, device facts.
//!
//! Nothing here is linked. [`Cuda::load`] opens the `libtorch_cuda` that lies beside the libtorch in use and then the
//! embedded shim (`shim/cuda.cpp`), so that one engine runs on machines with and without CUDA. It must be called before
//! anything asks libtorch whether there is a device: libtorch looks for its CUDA half once and remembers the answer.
#![expect(unsafe_code, reason = "a shared object of our own, opened at run time")]

use std::{
    ffi::{CStr, c_char, c_void},
    fs,
    io::Write,
    os::fd::{AsRawFd, FromRawFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_NOW};
use tch::Tensor;

use crate::{Error, Result};

/// The shim, or nothing where it could not be built.
static SHIM: &[u8] = include_bytes!(env!("LORA_CUDA_SHIM"));

/// Why the shim is missing.
const SHIM_MISSING: &str = env!("LORA_CUDA_SHIM_MISSING");

/// What `lora_cuda_interface` of the shim that this file was written for returns.
const INTERFACE: i32 = 2;

/// libtorch's CUDA half with the shim on top; cheap to clone.
#[derive(Debug, Clone)]
pub struct Cuda {
    shim: Arc<Shim>,
    device: i32,
}

/// Facts about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its name, for example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: [i64; 2],
    /// Number of multiprocessors.
    pub multiprocessors: i64,
    /// Bytes of memory.
    pub memory: u64,
}

/// Bytes in use on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Free, as the driver sees it.
    pub free: u64,
    /// All there is.
    pub total: u64,
    /// In tensors of this process.
    pub allocated: u64,
    /// The most that was in tensors since the last [`Cuda::reset_peak`].
    pub allocated_peak: u64,
    /// Held by this process' allocator.
    pub reserved: u64,
    /// The most that was held.
    pub reserved_peak: u64,
}

/// Which kernels `scaled_dot_product_attention` may choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionKernels {
    /// FlashAttention 2.
    pub flash: bool,
    /// The memory-efficient kernel.
    pub efficient: bool,
    /// cuDNN's kernel, the fastest on Hopper.
    pub cudnn: bool,
    /// The plain formula.
    pub formula: bool,
}

impl Cuda {
    /// Opens libtorch's CUDA half and the shim, and checks that `device` is there.
    ///
    /// # Errors
    /// Says what is missing: the CUDA build of libtorch, one of its libraries, the shim, a driver, or the device.
    pub fn load(device: usize) -> Result<Self> {
        static LOADED: OnceLock<std::result::Result<Arc<Shim>, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| Shim::open().map(Arc::new));
        let shim = loaded.clone().map_err(|reason| Error::Cuda { reason })?;
        let mut count = 0;
        // SAFETY: `count` is a place for one `int32_t`.
        shim.checked(unsafe { (shim.calls.device_count)(&mut count) })?;
        match i32::try_from(device) {
            Ok(device) if device < count => Ok(Self { shim, device }),
            _ if count == 0 => Err(Error::Cuda { reason: "the driver shows no device".to_owned() }),
            _ => Err(Error::Cuda { reason: format!("there is no device {device}; the driver shows {count}") }),
        }
    }

    /// Name, capability and memory of the device.
    pub fn facts(&self) -> Result<DeviceFacts> {
        let (mut name, mut numbers) = ([0_u8; 256], [0_i64; 4]);
        // SAFETY: the buffers have the sizes that the shim writes at most.
        self.shim.checked(unsafe {
            (self.shim.calls.device)(self.device, name.as_mut_ptr().cast(), numbers.as_mut_ptr())
        })?;
        let [major, minor, multiprocessors, memory] = numbers;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
        Ok(DeviceFacts { name, capability: [major, minor], multiprocessors, memory: memory.cast_unsigned() })
    }

    /// What is in use.
    pub fn memory(&self) -> Result<Memory> {
        let mut numbers = [0_i64; 6];
        // SAFETY: the shim writes six numbers.
        self.shim.checked(unsafe { (self.shim.calls.memory)(self.device, numbers.as_mut_ptr()) })?;
        let [free, total, allocated, allocated_peak, reserved, reserved_peak] = numbers.map(i64::cast_unsigned);
        Ok(Memory { free, total, allocated, allocated_peak, reserved, reserved_peak })
    }

    /// Starts the peaks of [`memory`](Self::memory) anew.
    pub fn reset_peak(&self) -> Result<()> {
        // SAFETY: takes a number only.
        self.shim.checked(unsafe { (self.shim.calls.reset_peak)(self.device) })
    }

    /// Gives unused memory of the caching allocator back to the driver.
    pub fn empty_cache(&self) -> Result<()> {
        // SAFETY: takes nothing.
        self.shim.checked(unsafe { (self.shim.calls.empty_cache)() })
    }

    /// Waits for all work of the device.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: takes nothing.
        self.shim.checked(unsafe { (self.shim.calls.synchronize)() })
    }

    /// Moves this thread's work to a stream of its own, since the default stream cannot be captured.
    ///
    /// What was enqueued before is waited for, so that tensors made earlier may be used.
    pub fn enter_side_stream(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: takes a number only.
        self.shim.checked(unsafe { (self.shim.calls.enter_side_stream)(self.device) })
    }

    /// Chooses the attention kernels, for the whole process.
    pub fn set_attention_kernels(&self, kernels: AttentionKernels) -> Result<()> {
        let AttentionKernels { flash, efficient, cudnn, formula } = kernels;
        let bits = i32::from(flash) | i32::from(efficient) << 1 | i32::from(cudnn) << 2 | i32::from(formula) << 3;
        // SAFETY: takes a number only.
        self.shim.checked(unsafe { (self.shim.calls.attention_kernels)(bits) })
    }

    /// Allows or forbids TF32 in 32-bit products and convolutions, for the whole process.
    pub fn allow_tf32(&self, allowed: bool) -> Result<()> {
        // SAFETY: takes a number only.
        self.shim.checked(unsafe { (self.shim.calls.allow_tf32)(i32::from(allowed)) })
    }

    /// The numbers of a matrix in 4 bits by one kernel: `packed` `[blocks, bytes]`, `factors` `[blocks, 1]`, 32-bit, and 16
    /// bits a number out, `[blocks, 2 · bytes]`; see [`Nf4`](crate::nf4::Nf4).
    ///
    /// # Errors
    /// If the kernel cannot be compiled here, or memory runs out.
    pub(crate) fn unpack_nf4(&self, packed: &Tensor, factors: &Tensor, half: bool) -> Result<Tensor> {
        let mut matrix = std::ptr::null_mut();
        // SAFETY: both tensors are live `at::Tensor*` that the call borrows; `matrix` is a place for the new one.
        self.shim.checked(unsafe {
            (self.shim.calls.unpack_nf4)(packed.as_ptr().cast(), factors.as_ptr().cast(), i32::from(half), &mut matrix)
        })?;
        // SAFETY: an owned `at::Tensor*`, which the new tensor takes over.
        Ok(unsafe { Tensor::from_ptr(matrix.cast()) })
    }

    /// An event, not yet recorded.
    pub fn event(&self) -> Result<Event> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a place for the new handle.
        self.shim.checked(unsafe { (self.shim.calls.event_new)(&mut handle) })?;
        Ok(Event { shim: self.shim.clone(), handle })
    }

    /// Memory that the graphs captured into it share; they must never be replayed at the same time.
    pub fn graph_pool(&self) -> Result<GraphPool> {
        let mut id = [0; 2];
        // SAFETY: the shim writes two numbers.
        self.shim.checked(unsafe { (self.shim.calls.pool_new)(id.as_mut_ptr()) })?;
        Ok(GraphPool { id })
    }

    /// Records what `work` enqueues on the current stream, without running it.
    ///
    /// # Errors
    /// Those of `work`, or if it did something that cannot be captured, such as waiting for the device.
    pub fn capture(&self, pool: GraphPool, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let calls = &self.shim.calls;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a place for the new handle.
        self.shim.checked(unsafe { (calls.graph_new)(&mut handle) })?;
        let mut graph = Graph { shim: self.shim.clone(), handle, nodes: 0 };
        // SAFETY: the handle is live, the pool has two numbers.
        self.shim.checked(unsafe { (calls.graph_begin)(handle, pool.id.as_ptr()) })?;
        let worked = work();
        // SAFETY: the handle is live. The capture is ended whatever came of the work, or the stream stays unusable.
        let ended = self.shim.checked(unsafe { (calls.graph_end)(handle) });
        worked?;
        ended?;
        // SAFETY: the handle is live and its capture ended well.
        self.shim.checked(unsafe { (calls.graph_instantiate)(handle, &mut graph.nodes) })?;
        Ok(graph)
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    shim: Arc<Shim>,
    handle: *mut c_void,
}

// SAFETY: a CUDA event may be used from any thread; the handle has one owner.
unsafe impl Send for Event {}

impl Event {
    /// Puts the event behind everything enqueued so far on the current stream.
    pub fn record(&self) -> Result<()> {
        // SAFETY: the handle is live until this value is dropped.
        self.shim.checked(unsafe { (self.shim.calls.event_record)(self.handle) })
    }

    /// Waits until the device has reached the event.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: as above.
        self.shim.checked(unsafe { (self.shim.calls.event_synchronize)(self.handle) })
    }

    /// Milliseconds from this event to a later one; both must have been reached.
    pub fn until(&self, later: &Self) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both handles are live; the shim writes one number.
        self.shim.checked(unsafe { (self.shim.calls.event_elapsed)(self.handle, later.handle, &mut milliseconds) })?;
        Ok(f64::from(milliseconds))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle came from `event_new` and is freed once.
        unsafe { (self.shim.calls.event_free)(self.handle) }
    }
}

/// See [`Cuda::graph_pool`].
#[derive(Debug, Clone, Copy)]
pub struct GraphPool {
    id: [u64; 2],
}

/// Captured work.
#[derive(Debug)]
pub struct Graph {
    shim: Arc<Shim>,
    handle: *mut c_void,
    nodes: i64,
}

// SAFETY: a graph may be replayed from any thread; the handle has one owner.
unsafe impl Send for Graph {}

impl Graph {
    /// Enqueues the captured work on the current stream.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the handle is live until this value is dropped, and was instantiated.
        self.shim.checked(unsafe { (self.shim.calls.graph_replay)(self.handle) })
    }

    /// How many kernels and copies were captured.
    pub fn nodes(&self) -> i64 {
        self.nodes
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle came from `graph_new` and is freed once.
        unsafe { (self.shim.calls.graph_free)(self.handle) }
    }
}

/// The opened shim; neither library is ever closed, since libtorch keeps pointers into its CUDA half.
#[derive(Debug)]
struct Shim {
    calls: Calls,
}

/// Declares the table of the shim's functions and the code that looks them up.
macro_rules! calls {
    ($($field:ident = $symbol:literal : $kind:ty),+ $(,)?) => {
        #[derive(Debug, Clone, Copy)]
        struct Calls { $($field: $kind),+ }

        impl Calls {
            /// The names that are looked up.
            #[cfg(test)]
            const NAMES: &[&[u8]] = &[$($symbol),+];

            /// # Safety
            /// `library` must be the shim, whose signatures these are, and must stay open.
            unsafe fn find(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: promised by the caller.
                unsafe { Ok(Self { $($field: *library.get::<$kind>($symbol)?),+ }) }
            }
        }
    };
}

calls! {
    interface = b"lora_cuda_interface": unsafe extern "C" fn() -> i32,
    error = b"lora_cuda_error": unsafe extern "C" fn() -> *const c_char,
    device_count = b"lora_cuda_device_count": unsafe extern "C" fn(*mut i32) -> i32,
    device = b"lora_cuda_device": unsafe extern "C" fn(i32, *mut c_char, *mut i64) -> i32,
    memory = b"lora_cuda_memory": unsafe extern "C" fn(i32, *mut i64) -> i32,
    reset_peak = b"lora_cuda_reset_peak": unsafe extern "C" fn(i32) -> i32,
    empty_cache = b"lora_cuda_empty_cache": unsafe extern "C" fn() -> i32,
    synchronize = b"lora_cuda_synchronize": unsafe extern "C" fn() -> i32,
    enter_side_stream = b"lora_cuda_enter_side_stream": unsafe extern "C" fn(i32) -> i32,
    attention_kernels = b"lora_cuda_attention_kernels": unsafe extern "C" fn(i32) -> i32,
    allow_tf32 = b"lora_cuda_allow_tf32": unsafe extern "C" fn(i32) -> i32,
    event_new = b"lora_cuda_event_new": unsafe extern "C" fn(*mut *mut c_void) -> i32,
    event_record = b"lora_cuda_event_record": unsafe extern "C" fn(*mut c_void) -> i32,
    event_synchronize = b"lora_cuda_event_synchronize": unsafe extern "C" fn(*mut c_void) -> i32,
    event_elapsed = b"lora_cuda_event_elapsed": unsafe extern "C" fn(*mut c_void, *mut c_void, *mut f32) -> i32,
    event_free = b"lora_cuda_event_free": unsafe extern "C" fn(*mut c_void),
    pool_new = b"lora_cuda_pool_new": unsafe extern "C" fn(*mut u64) -> i32,
    graph_new = b"lora_cuda_graph_new": unsafe extern "C" fn(*mut *mut c_void) -> i32,
    graph_begin = b"lora_cuda_graph_begin": unsafe extern "C" fn(*mut c_void, *const u64) -> i32,
    graph_end = b"lora_cuda_graph_end": unsafe extern "C" fn(*mut c_void) -> i32,
    graph_instantiate = b"lora_cuda_graph_instantiate": unsafe extern "C" fn(*mut c_void, *mut i64) -> i32,
    graph_replay = b"lora_cuda_graph_replay": unsafe extern "C" fn(*mut c_void) -> i32,
    unpack_nf4 = b"lora_cuda_unpack_nf4": unsafe extern "C" fn(*const c_void, *const c_void, i32, *mut *mut c_void) -> i32,
    graph_free = b"lora_cuda_graph_free": unsafe extern "C" fn(*mut c_void),
}

impl Shim {
    fn open() -> std::result::Result<Self, String> {
        if SHIM.is_empty() {
            return Err(format!("this build has no CUDA support ({SHIM_MISSING})"));
        }
        let folder = libtorch_folder()?;
        let torch = folder.join("libtorch_cuda.so");
        if !torch.is_file() {
            return Err(format!("libtorch has no CUDA half: {} is missing", torch.display()));
        }
        open_for_good(&torch, RTLD_LAZY | RTLD_GLOBAL)?;
        // The compiler of kernels asks the loader for its built-in functions by name, and has no path to where they lie in
        // the wheels. Without it there are slower ways, so nothing depends on this.
        let beside = folder.canonicalize().unwrap_or(folder).join("../../nvidia/cu13/lib/libnvrtc-builtins.so.13.0");
        let _ = open_for_good(&beside, RTLD_LAZY | RTLD_GLOBAL);
        let shim = embedded(SHIM).map_err(|error| format!("cannot unpack the shim: {error}"))?;
        let library = open_for_good(&shim.path, RTLD_NOW)?;
        // SAFETY: the library is the shim that was built with this crate, and it is never closed.
        let calls = unsafe { Calls::find(library) }.map_err(|error| reason_of(&error))?;
        // SAFETY: takes nothing.
        let interface = unsafe { (calls.interface)() };
        if interface == INTERFACE {
            Ok(Self { calls })
        } else {
            Err(format!("the shim has interface {interface}, expected {INTERFACE}"))
        }
    }

    fn checked(&self, code: i32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the shim returns a C string that lives until this thread's next failure.
        let message = unsafe { CStr::from_ptr((self.calls.error)()) }.to_string_lossy();
        let message = message.lines().next().unwrap_or_default().to_owned();
        if message.contains("out of memory") {
            Err(Error::OutOfMemory { message })
        } else {
            Err(Error::Cuda { reason: message })
        }
    }
}

/// A file that lives in memory for as long as it is open.
struct InMemory {
    path: PathBuf,
    _file: fs::File,
}

fn embedded(bytes: &[u8]) -> std::io::Result<InMemory> {
    // SAFETY: the name is a C string; the result is checked before it is owned.
    let mut file = unsafe {
        let descriptor = libc::memfd_create(c"lora_cuda".as_ptr(), libc::MFD_CLOEXEC);
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error());
        }
        fs::File::from_raw_fd(descriptor)
    };
    file.write_all(bytes)?;
    Ok(InMemory { path: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())), _file: file })
}

/// Opens a library and keeps it until the process ends.
fn open_for_good(path: &Path, flags: i32) -> std::result::Result<&'static Library, String> {
    // SAFETY: the initialisers of libtorch's libraries and of the shim may run at any time; nothing is unloaded.
    let library = unsafe { Library::open(Some(path), flags) }.map_err(|error| reason_of(&error))?;
    Ok(Box::leak(Box::new(library)))
}

/// What the dynamic loader said; the error itself only says which call failed.
fn reason_of(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Where the libtorch in use was loaded from.
fn libtorch_folder() -> std::result::Result<PathBuf, String> {
    unsafe extern "C" {
        fn aoti_torch_device_type_cpu() -> i32;
    }
    // SAFETY: all-zero is a valid `Dl_info`; the address is one of libtorch_cpu's functions and is not called.
    let (found, info) = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let found = libc::dladdr(aoti_torch_device_type_cpu as *const c_void, &mut info);
        (found, info)
    };
    if found == 0 || info.dli_fname.is_null() {
        return Err("the folder of libtorch is unknown".to_owned());
    }
    // SAFETY: a C string of the dynamic loader, which lives as long as libtorch is loaded.
    let file = unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned();
    let folder = Path::new(&file).parent().map(Path::to_path_buf);
    folder.ok_or_else(|| format!("{file} has no folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_was_built_or_says_why_not() {
        assert_eq!(SHIM.is_empty(), !SHIM_MISSING.is_empty(), "{SHIM_MISSING}");
        if !SHIM.is_empty() {
            assert_eq!(&SHIM[..4], b"\x7fELF");
        }
    }

    #[test]
    fn every_function_that_is_looked_up_is_in_the_shim() {
        let has = |name: &[u8]| SHIM.windows(name.len() + 1).any(|window| window == [name, b"\0"].concat());
        for name in Calls::NAMES {
            assert!(SHIM.is_empty() || has(name), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        assert!(libtorch_folder().unwrap().join("libtorch_cpu.so").is_file());
    }

    #[test]
    fn a_machine_without_cuda_gets_a_reason() {
        match Cuda::load(0) {
            Ok(cuda) => assert!(cuda.facts().unwrap().memory > 0), // a machine with a device
            Err(Error::Cuda { reason }) => {
                assert!(["lib", "driver", "this build"].iter().any(|what| reason.contains(what)), "{reason}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}
