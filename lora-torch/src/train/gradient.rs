//! Loss and gradient of a batch, in one piece or shared out over threads.
//!
//! ```text
//!           ┌─► thread 1: model, half of the batch ─► loss, flat gradient ─┐
//! inputs ───┤                                                              ├─► weighted sum, always in this order
//!           └─► thread 2: model, the other half    ─► loss, flat gradient ─┘
//! ```
//!
//! Every thread has a model of its own over the same frozen tensors, and views of the one leaf. Nothing is drawn and nothing
//! is written there, so the sum depends on the number of threads alone, and a resumed run repeats it bit for bit.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

use tch::{Kind, Tensor};

use super::trained::Trained;
use crate::{Error, Model, Result, arena::Arena};

/// Loss, `[1]`, and its gradient, laid out as the arena; both 32-bit and cut off from the graph.
#[derive(Debug)]
pub(super) struct Gradient {
    pub(super) gradient: Tensor,
    pub(super) loss: Tensor,
}

impl Gradient {
    /// One forward and backward pass. The loss is multiplied by `scale` in between, if there is one.
    pub(super) fn of(
        model: &mut dyn Model,
        trained: &Trained,
        arena: &Arena,
        inputs: &[Tensor],
        scale: Option<&Tensor>,
    ) -> Result<Self> {
        tch::with_grad(|| {
            trained.attach(model, arena)?;
            let loss = model.loss(inputs)?;
            let gradient = match scale {
                Some(scale) => arena.gradient(&loss.f_mul(scale)?.f_sum(None)?)?.f_div(scale)?,
                None => arena.gradient(&loss)?,
            };
            Ok(Self { gradient, loss: loss.f_detach()?.f_view([1])?.f_to_kind(Kind::Float)? })
        })
    }
}

/// Threads with a model each.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    work: Sender<Work>,
    done: Receiver<Result<Gradient>>,
    thread: Option<JoinHandle<()>>,
}

/// A share of a batch.
struct Work {
    inputs: Vec<Tensor>,
    scale: Option<Tensor>,
}

impl Lanes {
    /// A thread for each of the models, of which there are at least two; otherwise none.
    ///
    /// The threads that libtorch used within each operation are divided among them.
    pub(super) fn start(models: Vec<Box<dyn Model + Send>>, trained: &Trained, arena: &Arena) -> Result<Option<Self>> {
        if models.len() < 2 {
            return Ok(None);
        }
        let all = tch::get_num_threads().max(1);
        let each = (all / models.len() as i32).max(1);
        let lanes = models.into_iter().map(|model| Lane::start(model, trained.share()?, arena.share(), each));
        let lanes = lanes.collect::<Result<_>>()?;
        tch::set_num_threads(all); // for whoever comes next; the lanes have settled theirs
        Ok(Some(Self { lanes }))
    }

    /// Loss and gradient of a batch, whose rows lie along the first axis of every input.
    pub(super) fn run(&self, inputs: &[Tensor], scale: Option<&Tensor>) -> Result<Gradient> {
        let _no_grad = tch::no_grad_guard();
        let rows = inputs.first().and_then(|input| input.size().first().copied()).unwrap_or(0) as usize;
        let shares = shares(rows, self.lanes.len());
        let lengths: Vec<i64> = shares.iter().map(|share| *share as i64).collect();
        let mut parts: Vec<Work> =
            shares.iter().map(|_| Work { inputs: Vec::new(), scale: scale.map(Tensor::shallow_clone) }).collect();
        for input in inputs {
            for (part, piece) in parts.iter_mut().zip(input.f_split_with_sizes(&lengths, 0)?) {
                part.inputs.push(piece);
            }
        }
        for (lane, part) in self.lanes.iter().zip(parts) {
            lane.work.send(part).map_err(|_| ended())?;
        }
        // All are waited for, whatever comes of one: nobody computes on while the next step begins.
        let done: Vec<Result<Gradient>> =
            self.lanes.iter().zip(&shares).map(|(lane, _)| lane.done.recv().map_err(|_| ended())?).collect();
        let mut sum: Option<Gradient> = None;
        for (part, share) in done.into_iter().zip(shares) {
            let Gradient { mut gradient, mut loss } = part?;
            let weight = share as f64 / rows as f64;
            let (gradient, loss) = (gradient.f_mul_scalar_(weight)?, loss.f_mul_scalar_(weight)?);
            sum = Some(match sum {
                Some(Gradient { gradient: mut sum, loss: mut total }) => {
                    Gradient { gradient: sum.f_add_(&gradient)?, loss: total.f_add_(&loss)? }
                }
                None => Gradient { gradient, loss },
            });
        }
        sum.ok_or_else(ended)
    }
}

impl Lane {
    fn start(mut model: Box<dyn Model + Send>, trained: Trained, arena: Arena, threads: i32) -> Result<Self> {
        let (work, receive) = channel::<Work>();
        let (send, done) = channel();
        let (settled, wait) = channel();
        let body = move || {
            tch::set_num_threads(threads);
            tch::get_num_threads(); // libtorch sets a thread's number once more when it is first asked for
            let _ = settled.send(());
            for Work { inputs, scale } in receive {
                let result = Gradient::of(&mut *model, &trained, &arena, &inputs, scale.as_ref());
                trained.detach(&mut *model);
                if send.send(result).is_err() {
                    break;
                }
            }
        };
        let thread = thread::Builder::new().name("lane".to_owned()).spawn(body);
        let thread = thread.map_err(|error| Error::Torch { message: format!("no thread for a lane: {error}") })?;
        wait.recv().map_err(|_| ended())?;
        Ok(Self { work, done, thread: Some(thread) })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.work = channel().0; // the thread sees that there will be no more
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic was reported when it happened
        }
    }
}

/// `rows` as evenly as can be over at most `lanes` lanes, none of which is left without one.
fn shares(rows: usize, lanes: usize) -> Vec<usize> {
    let lanes = lanes.min(rows);
    (0..lanes).map(|lane| (lane + 1) * rows / lanes - lane * rows / lanes).collect()
}

fn ended() -> Error {
    Error::Torch { message: "a training thread has ended".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn rows_are_shared_out_evenly() {
        assert_eq!(shares(4, 2), [2, 2]);
        assert_eq!(shares(5, 2), [2, 3]);
        assert_eq!(shares(1, 2), [1]);
        assert_eq!(shares(7, 3), [2, 2, 3]);
    }
}
