//! Which pictures make up the batch of a step: a pure function of the seed and the number of the batch.
//!
//! Every bucket has an endless stream: all its exposures in a random order, then again in another one, epoch after epoch.
//! Its batches are consecutive pieces of that stream, so that every batch is full, nothing is dropped, and no picture
//! is shown more often than its share; the last piece of an epoch borrows from the next, which then does not repeat what
//! was borrowed. The pieces of all buckets that fall into an epoch are shuffled together. There is no state: a resumed
//! run sees the batches that the uninterrupted one would have seen.
//!
//! With accumulation a piece is as long as all batches of a step together, so that two batches of two show what one batch
//! of four would have shown.

use lora_core::{Draw, Purpose};

/// The order of training.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    batch: usize,
    /// Batches of a step.
    micro_steps: usize,
    groups: Vec<Group>,
    pictures: usize,
}

#[derive(Debug, Clone)]
struct Group {
    bucket: [u32; 2],
    /// Picture numbers, each as often as it is repeated.
    exposures: Vec<u32>,
}

/// The pictures of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Number of the bucket; the same for all batches of its size.
    pub group: usize,
    /// Its width and height in pixels.
    pub bucket: [u32; 2],
    /// Numbers of the pictures.
    pub pictures: Vec<usize>,
}

impl Order {
    /// The order of pictures given by bucket and repeats, for batches of `batch`.
    ///
    /// A batch larger than all exposures of an epoch together is cut down to them; see [`batch_size`](Self::batch_size).
    /// `None` if there is no exposure or the batch is 0.
    pub fn new(pictures: impl IntoIterator<Item = ([u32; 2], u32)>, batch: usize, seed: u64) -> Option<Self> {
        let mut groups: Vec<Group> = Vec::new();
        let mut count = 0;
        for (picture, (bucket, repeats)) in pictures.into_iter().enumerate() {
            count += 1;
            let at = groups.binary_search_by_key(&bucket, |group| group.bucket).unwrap_or_else(|at| {
                groups.insert(at, Group { bucket, exposures: Vec::new() });
                at
            });
            groups[at].exposures.extend(std::iter::repeat_n(picture as u32, repeats as usize));
        }
        groups.retain(|group| !group.exposures.is_empty());
        let total: usize = groups.iter().map(|group| group.exposures.len()).sum();
        (total > 0 && batch > 0).then_some(Self {
            seed,
            batch: batch.min(total),
            micro_steps: 1,
            groups,
            pictures: count,
        })
    }

    /// The same with so many batches to a step, at least one.
    pub fn accumulating(self, micro_steps: usize) -> Self {
        Self { micro_steps: micro_steps.max(1), ..self }
    }

    /// Pictures in a batch, after cutting down.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// Number of buckets.
    pub fn buckets(&self) -> usize {
        self.groups.len()
    }

    /// Exposures of one epoch.
    pub fn exposures(&self) -> u64 {
        self.groups.iter().map(|group| group.exposures.len() as u64).sum()
    }

    /// Steps of the first `epochs` epochs.
    pub fn steps(&self, epochs: u64) -> u64 {
        self.groups.iter().map(|group| group.through(epochs, self.piece())).sum()
    }

    /// Batches of the first `epochs` epochs: those of their steps.
    pub fn batches(&self, epochs: u64) -> u64 {
        self.steps(epochs) * self.micro_steps as u64
    }

    /// The epoch that a step belongs to, and its place in it; both counted from 0.
    pub fn epoch_of(&self, step: u64) -> (u64, u64) {
        // The last epoch that begins at this step or before.
        let (mut low, mut high) = (0, step * self.piece() as u64 / self.exposures() + 1);
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if self.steps(middle) <= step { low = middle } else { high = middle }
        }
        (low, step - self.steps(low))
    }

    /// The pictures of all batches of the step with this number, counted from 0.
    pub fn step(&self, step: u64) -> Chosen {
        let (epoch, place) = self.epoch_of(step);
        let pieces: Vec<(usize, u64)> = (0..self.groups.len())
            .flat_map(|at| {
                let through = |epochs| self.groups[at].through(epochs, self.piece());
                (through(epoch)..through(epoch + 1)).map(move |piece| (at, piece))
            })
            .collect();
        let shuffled = Draw::new(self.seed, Purpose::Order, epoch, 0).permutation(pieces.len());
        let (group, piece) = pieces[shuffled[place as usize]];
        let start = piece * self.piece() as u64;
        let mut order = None;
        let positions = start..start + self.piece() as u64;
        let pictures = positions.map(|position| self.exposure(group, position, &mut order)).collect();
        Chosen { group, bucket: self.groups[group].bucket, pictures }
    }

    /// The pictures of the batch with this number, counted from 0 over all steps.
    pub fn batch(&self, number: u64) -> Chosen {
        let micro_steps = self.micro_steps as u64;
        let Chosen { group, bucket, mut pictures } = self.step(number / micro_steps);
        let first = (number % micro_steps) as usize * self.batch;
        pictures.drain(..first);
        pictures.truncate(self.batch);
        Chosen { group, bucket, pictures }
    }

    /// How often each picture is shown in the first `batches` batches.
    pub fn shown(&self, batches: u64) -> Vec<u64> {
        let mut shown = vec![0; self.pictures];
        let (epoch, _) = self.epoch_of(batches / self.micro_steps as u64);
        for (at, group) in self.groups.iter().enumerate() {
            // What is over by whole epochs is counted, not drawn.
            let length = group.exposures.len() as u64;
            let end = group.through(epoch, self.piece()) * self.piece() as u64;
            group.exposures.iter().for_each(|picture| shown[*picture as usize] += end / length);
            let mut order = None;
            for position in end / length * length..end {
                shown[self.exposure(at, position, &mut order)] += 1;
            }
        }
        for number in self.batches(epoch)..batches {
            self.batch(number).pictures.into_iter().for_each(|picture| shown[picture] += 1);
        }
        shown
    }

    /// Pictures of a step.
    fn piece(&self) -> usize {
        self.batch * self.micro_steps
    }

    /// The picture at a position of a bucket's stream; `order` keeps the epoch's permutation between calls.
    fn exposure(&self, group: usize, position: u64, order: &mut Option<(u64, Vec<usize>)>) -> usize {
        let exposures = &self.groups[group].exposures;
        let epoch = position / exposures.len() as u64;
        if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut draw = Draw::new(self.seed, Purpose::Order, epoch, group as u32 + 1);
            *order = Some((epoch, draw.permutation(exposures.len())));
        }
        let place = (position % exposures.len() as u64) as usize;
        let at = order.as_ref().map_or(0, |(_, order)| order[place]);
        exposures[at] as usize
    }
}

impl Group {
    /// Pieces that hold the exposures of the first `epochs` epochs.
    fn through(&self, epochs: u64, piece: usize) -> u64 {
        (self.exposures.len() as u64 * epochs).div_ceil(piece as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 17 pictures in three buckets, one of them with three repeats.
    fn order(batch: usize) -> Order {
        let pictures = (0..17).map(|at| ([64 * (1 + at % 3), 64], if at == 4 { 3 } else { 1 }));
        Order::new(pictures, batch, 11).unwrap()
    }

    #[test]
    fn every_batch_is_full_and_of_one_bucket() {
        let order = order(4);
        for number in 0..200 {
            let chosen = order.batch(number);
            assert_eq!(chosen.pictures.len(), 4);
            assert!(chosen.pictures.iter().all(|picture| 64 * (1 + *picture as u32 % 3) == chosen.bucket[0]));
        }
    }

    #[test]
    fn every_picture_is_seen_in_every_epoch_by_its_repeats_and_no_more_in_the_end() {
        for batch in [1, 2, 4, 5, 19, 64] {
            let order = order(batch);
            let epochs = 60;
            for (epochs, spare) in [(1, order.batch_size() as u64), (epochs, order.batch_size() as u64)] {
                let shown = order.shown(order.batches(epochs));
                for (picture, shown) in shown.iter().enumerate() {
                    let share = epochs * if picture == 4 { 3 } else { 1 };
                    assert!((share..=share + spare).contains(shown), "batch {batch}: {picture} shown {shown} times");
                }
            }
        }
    }

    #[test]
    fn counting_ahead_agrees_with_drawing() {
        let order = order(4);
        for order in [order.clone(), order.accumulating(3)] {
            for batches in [0, 1, 5, 6, 37, 100] {
                let mut drawn = vec![0; 17];
                (0..batches).for_each(|at| order.batch(at).pictures.iter().for_each(|picture| drawn[*picture] += 1));
                assert_eq!(order.shown(batches), drawn, "{batches}");
            }
        }
    }

    #[test]
    fn epochs_differ_and_follow_each_other() {
        let order = order(4);
        let epoch = |epoch: u64| -> Vec<Chosen> {
            (order.steps(epoch)..order.steps(epoch + 1)).map(|step| order.step(step)).collect()
        };
        assert_ne!(epoch(0), epoch(1));
        for number in 0..100 {
            let (epoch, place) = order.epoch_of(number);
            assert_eq!(order.steps(epoch) + place, number);
            assert!(number < order.steps(epoch + 1));
        }
    }

    #[test]
    fn a_batch_is_a_function_of_seed_and_number() {
        let (a, b) = (order(4), order(4));
        (0..50).rev().for_each(|number| assert_eq!(a.batch(number), b.batch(number)));
        let other = Order { seed: 12, ..a.clone() };
        assert!((0..50).any(|number| a.batch(number) != other.batch(number)));
    }

    #[test]
    fn accumulated_batches_show_what_one_large_batch_shows() {
        let (large, small) = (order(6), order(2).accumulating(3));
        for step in 0..50 {
            let together: Vec<usize> = (0..3).flat_map(|micro| small.batch(step * 3 + micro).pictures).collect();
            assert_eq!(together, large.batch(step).pictures);
        }
        assert_eq!((small.steps(5), small.batches(5)), (large.steps(5), 3 * large.batches(5)));
    }

    #[test]
    fn a_batch_beyond_the_data_is_cut_down() {
        assert_eq!(Order::new([([64, 64], 1)], 4, 0).unwrap().batch_size(), 1);
        assert_eq!(Order::new([([64, 64], 10)], 4, 0).unwrap().batch_size(), 4);
        assert!(Order::new([([64, 64], 0)], 4, 0).is_none());
        assert!(Order::new([], 4, 0).is_none());
    }
}
