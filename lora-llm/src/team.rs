//! A few threads that go through many short stages together, and the vectors that they pass to each other.
//!
//! An id of a small model takes some dozens of stages of a few microseconds; to start threads for each would cost more than
//! the stages. Here they start once for all stages. Work is not dealt out but taken, piece by piece, so that a thread that
//! the system has put to sleep, or not yet woken, keeps nobody waiting unless it sleeps on a piece.

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// How often a waiting member looks before it lets other threads have the processor.
const LOOKS: u32 = 500;

/// Pieces of a stage for each member, so that one that comes late finds something to do.
const PIECES: usize = 4;

/// Threads that work through the same stages.
#[derive(Debug)]
struct Team {
    size: usize,
    stages: Vec<Stage>,
    broken: AtomicBool,
}

/// How far a stage is: things that have been taken, and things that are done.
#[derive(Debug, Default)]
struct Stage {
    taken: AtomicUsize,
    done: AtomicUsize,
}

/// One of the threads.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    team: &'a Team,
    /// The stage that it comes to next.
    stage: usize,
}

/// Runs `work` in at most `most` threads, and as many as libtorch uses, each of which goes through the same `stages` stages,
/// and waits for all.
///
/// # Panics
/// If one of them does.
pub(crate) fn together(most: usize, stages: usize, work: impl Fn(&mut Member<'_>) + Sync) {
    let helpers = helpers().filter(|_| most > 1);
    let size = most.min(1 + helpers.map_or(0, ThreadPool::current_num_threads)).max(1);
    let stages = (0..stages).map(|_| Stage::default()).collect();
    let team = Team { size, stages, broken: AtomicBool::new(false) };
    let go = || work(&mut Member { team: &team, stage: 0 });
    match helpers {
        None => go(),
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..size {
                scope.spawn(|_| go());
            }
            go();
        }),
    }
}

/// The other threads: one fewer than libtorch has, `None` if it has but one.
fn helpers() -> Option<&'static ThreadPool> {
    static HELPERS: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let made = HELPERS.get_or_init(|| {
        let count = usize::try_from(tch::get_num_threads()).unwrap_or(1).saturating_sub(1);
        if count == 0 {
            return None;
        }
        ThreadPoolBuilder::new().num_threads(count).thread_name(|number| format!("team-{number}")).build().ok()
    });
    made.as_ref()
}

impl Member<'_> {
    /// Takes part in the next stage, of `count` things in groups of `group`, until all of it is done.
    ///
    /// `prepare` is asked once, and only if there is something left to do: what it reads was written in earlier stages, and
    /// nobody goes on to later ones before this stage is done. What `work` writes is seen by all in the next stage.
    ///
    /// # Panics
    /// If another member did.
    pub(crate) fn stage<P>(
        &mut self,
        count: usize,
        group: usize,
        prepare: impl Fn() -> P,
        work: impl Fn(&P, Range<usize>),
    ) {
        let Team { size, stages, broken } = self.team;
        let Stage { taken, done } = &stages[self.stage];
        self.stage += 1;
        let piece = count.div_ceil(PIECES * size).next_multiple_of(group);
        let mut prepared = None;
        loop {
            let start = taken.fetch_add(piece, Ordering::Relaxed);
            if start >= count {
                break;
            }
            let range = start..count.min(start + piece);
            let length = range.len();
            work(prepared.get_or_insert_with(&prepare), range);
            done.fetch_add(length, Ordering::AcqRel);
        }
        let mut looks = 0;
        while done.load(Ordering::Acquire) < count {
            assert!(!broken.load(Ordering::Relaxed), "another thread of the team has failed");
            looks += 1;
            if looks < LOOKS { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.team.broken.store(true, Ordering::Relaxed);
        }
    }
}

/// A vector that all members read, and of which each writes what it works out.
#[derive(Debug)]
pub(crate) struct Shared(Vec<AtomicU32>);

impl Shared {
    pub(crate) fn new(values: &[f32]) -> Self {
        Self(values.iter().map(|value| AtomicU32::new(value.to_bits())).collect())
    }

    pub(crate) fn zeros(length: usize) -> Self {
        Self((0..length).map(|_| AtomicU32::new(0)).collect())
    }

    /// Writes `values` from `start` on.
    pub(crate) fn write(&self, start: usize, values: &[f32]) {
        for (slot, value) in self.0[start..start + values.len()].iter().zip(values) {
            slot.store(value.to_bits(), Ordering::Relaxed);
        }
    }

    /// The values of a range.
    pub(crate) fn read(&self, range: Range<usize>) -> Vec<f32> {
        self.0[range].iter().map(|slot| f32::from_bits(slot.load(Ordering::Relaxed))).collect()
    }

    /// All values.
    pub(crate) fn into_vec(self) -> Vec<f32> {
        self.0.into_iter().map(|slot| f32::from_bits(slot.into_inner())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_sees_what_the_one_before_it_wrote() {
        const ROUNDS: usize = 1000;
        let (values, sums) = (Shared::zeros(61), Shared::zeros(ROUNDS));
        together(usize::MAX, 2 * ROUNDS, |member| {
            for round in 0..ROUNDS {
                let write = |&(): &(), range: Range<usize>| {
                    for at in range {
                        values.write(at, &[(round + at) as f32]);
                    }
                };
                member.stage(61, 4, || (), write);
                let sum = || values.read(0..61).iter().sum::<f32>();
                member.stage(1, 1, sum, |sum, _| sums.write(round, &[*sum]));
            }
        });
        let expected: Vec<f32> = (0..ROUNDS).map(|round| (0..61).map(|at| (round + at) as f32).sum()).collect();
        assert_eq!(sums.into_vec(), expected);
    }

    #[test]
    fn pieces_are_whole_groups_and_cover_everything_once() {
        for (count, group) in [(1, 4), (8, 4), (23, 4), (100, 1)] {
            let counted = Shared::zeros(count);
            together(usize::MAX, 1, |member| {
                member.stage(
                    count,
                    group,
                    || (),
                    |&(), range| {
                        assert!(range.start % group == 0 && (range.end % group == 0 || range.end == count));
                        let before = counted.read(range.clone());
                        counted.write(range.start, &before.iter().map(|value| value + 1.0).collect::<Vec<_>>());
                    },
                );
            });
            assert_eq!(counted.into_vec(), vec![1.0; count]);
        }
    }
}
