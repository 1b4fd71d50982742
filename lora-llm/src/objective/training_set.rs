//! Examples in an order of their own in every epoch, as rows.

use std::sync::{Mutex, PoisonError};

use lora_core::{Draw, Purpose};

use super::Source;
use crate::{Decoder, Error, Example, Result, example::pack};

/// Everything that is trained on.
#[derive(Debug)]
pub struct TrainingSet {
    examples: Vec<Example>,
    /// The examples of each row.
    rows: Vec<Vec<usize>>,
    seed: u64,
    rows_a_batch: usize,
    accumulation: u64,
    /// The order of the rows in the epochs that were looked at last.
    orders: Mutex<Vec<(u64, Vec<usize>)>>,
}

impl TrainingSet {
    /// A set whose batches have `rows_a_batch` rows, of one example each, or of as many as fit into `packed` ids.
    ///
    /// # Errors
    /// If nothing in it counts, an id is unknown to the model, or an example has more ids than the model has positions.
    pub fn new(
        examples: Vec<Example>,
        decoder: &Decoder,
        seed: u64,
        rows_a_batch: usize,
        accumulation: u64,
        packed: Option<usize>,
    ) -> Result<Self> {
        let limit = decoder.config().max_positions;
        for example in &examples {
            decoder.check(&example.ids)?;
            let length = example.ids.len();
            if length > limit {
                return Err(Error::TooLong { what: "an example", length, limit });
            }
        }
        let useful = |index: &usize| examples[*index].targets() > 0;
        let rows: Vec<Vec<usize>> = match packed {
            Some(length) => pack(&examples, length),
            None => (0..examples.len()).map(|index| vec![index]).collect(),
        };
        let rows: Vec<Vec<usize>> = rows.into_iter().filter(|row| row.iter().any(useful)).collect();
        if rows.is_empty() || rows_a_batch == 0 {
            let reason = "no example has a token that is trained".to_owned();
            return Err(Error::Request { option: "data", reason });
        }
        Ok(Self { examples, rows, seed, rows_a_batch, accumulation: accumulation.max(1), orders: Mutex::default() })
    }

    /// How many rows an epoch has.
    pub fn rows_an_epoch(&self) -> usize {
        self.rows.len()
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The row at a place of the endless sequence of epochs.
    fn row(&self, place: u64) -> &[usize] {
        let count = self.rows.len() as u64;
        let (epoch, within) = (place / count, (place % count) as usize);
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = orders.iter().find(|(of, _)| *of == epoch) {
            return &self.rows[order[within]];
        }
        let order = Draw::new(self.seed, Purpose::Order, epoch, 0).permutation(self.rows.len());
        let row = order[within];
        // A step may reach from one epoch into the next.
        if orders.len() == 2 {
            orders.remove(0);
        }
        orders.push((epoch, order));
        &self.rows[row]
    }
}

impl Source for TrainingSet {
    fn rows(&self, step: u64, micro: u64) -> Vec<Vec<&Example>> {
        let first = (step * self.accumulation + micro) * self.rows_a_batch as u64;
        let row = |at: u64| self.row(first + at).iter().map(|index| &self.examples[*index]).collect();
        (0..self.rows_a_batch as u64).map(row).collect()
    }
}
