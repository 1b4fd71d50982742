//! Adafactor: the second moment of a matrix as the product of its row and column means (Shazeer and Stern 2018,
//! arXiv 1804.04235, algorithm 4), in the form of `transformers.Adafactor` with an external learning rate.
//!
//! Factored state has a shape per factor, so this rule works piece by piece. Tensors with more than two axes are
//! factored over the last two, as transformers does; the rule is the same for a matrix that is turned over.

use tch::{Kind, Tensor};

use super::{Rule, Update, scalar};
use crate::{Result, arena::Arena, arena::Piece, backend::signed};

/// Added to squared gradients, and the least root mean square of a parameter.
const EPSILONS: [f64; 2] = [1e-30, 1e-3];

#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) decay_exponent: f64,
    pub(super) clip_threshold: f64,
    pub(super) scale_parameter: bool,
    pub(super) weight_decay: f64,
}

#[derive(Debug)]
pub(super) struct Adafactor {
    settings: Settings,
    pieces: Vec<(Piece, Moment)>,
    /// Steps that were applied.
    steps: Tensor,
}

#[derive(Debug)]
enum Moment {
    /// Mean over columns and over rows.
    Factored {
        rows: Tensor,
        columns: Tensor,
    },
    Whole(Tensor),
}

impl Adafactor {
    pub(super) fn new(arena: &Arena, settings: Settings) -> Result<Self> {
        let zeros = |shape: &[usize]| Tensor::f_zeros(signed(shape), (Kind::Float, arena.device()));
        let mut pieces = Vec::new();
        for piece in arena.pieces() {
            let moment = match piece.stored_shape().as_slice() {
                [leading @ .., rows, columns] => Moment::Factored {
                    rows: zeros(&[leading, &[*rows]].concat())?,
                    columns: zeros(&[leading, &[*columns]].concat())?,
                },
                shape => Moment::Whole(zeros(shape)?),
            };
            pieces.push((piece.clone(), moment));
        }
        Ok(Self { settings, pieces, steps: scalar(0.0, arena.device())? })
    }
}

impl Rule for Adafactor {
    fn step(&mut self, update: &Update<'_>) -> Result<()> {
        let Settings { decay_exponent, clip_threshold, scale_parameter, weight_decay } = self.settings;
        let clipped = update.clipped()?;
        let steps = self.steps.f_add_scalar(1.0)?;
        update.commit(&self.steps, &steps)?;
        let fresh = steps.f_pow_tensor_scalar(decay_exponent)?; // weight of the newest square
        for (piece, moment) in &self.pieces {
            let whole = |flat: &Tensor| flat.f_narrow(0, piece.offset as i64, piece.length() as i64);
            let parameters = whole(update.parameters)?.f_view(signed(&piece.stored_shape()).as_slice())?;
            let gradient = whole(&clipped)?.f_view(signed(&piece.stored_shape()).as_slice())?;
            let squares = gradient.f_square()?.f_add_scalar(EPSILONS[0])?;
            let next = |old: &Tensor, new: &Tensor| old.f_lerp_tensor(new, &fresh);
            let mut change = match moment {
                Moment::Factored { rows, columns } => {
                    let next_rows = next(rows, &squares.f_mean_dim(-1, false, None)?)?;
                    let next_columns = next(columns, &squares.f_mean_dim(-2, false, None)?)?;
                    update.commit(rows, &next_rows)?;
                    update.commit(columns, &next_columns)?;
                    let row_factor = next_rows.f_div(&next_rows.f_mean_dim(-1, true, None)?)?.f_rsqrt()?;
                    let column_factor = next_columns.f_rsqrt()?;
                    gradient.f_mul(&row_factor.f_unsqueeze(-1)?)?.f_mul(&column_factor.f_unsqueeze(-2)?)?
                }
                Moment::Whole(second) => {
                    let next_second = next(second, &squares)?;
                    update.commit(second, &next_second)?;
                    gradient.f_mul(&next_second.f_rsqrt()?)?
                }
            };
            change = change.f_div(&root_mean_square(&change)?.f_div_scalar(clip_threshold)?.f_clamp_min(1.0)?)?;
            let mut rate = update.rates[piece.group].shallow_clone();
            if scale_parameter {
                rate = rate.f_mul(&root_mean_square(&parameters)?.f_clamp_min(EPSILONS[1])?)?;
            }
            let decay = parameters.f_mul_scalar(weight_decay)?;
            update.commit(&parameters, &parameters.f_sub(&change.f_add(&decay)?.f_mul(&rate)?)?)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, &Tensor)> {
        let mut state = vec![("steps".into(), &self.steps)];
        for (index, (_, moment)) in self.pieces.iter().enumerate() {
            match moment {
                Moment::Factored { rows, columns } => {
                    state.extend([(format!("{index}.rows"), rows), (format!("{index}.columns"), columns)]);
                }
                Moment::Whole(second) => state.push((format!("{index}.second"), second)),
            }
        }
        state
    }
}

/// √mean(x²), a scalar.
fn root_mean_square(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_norm()?.f_div_scalar((tensor.numel() as f64).sqrt())?)
}

#[cfg(test)]
mod tests {
    use crate::optimizer::{
        OptimizerConfig,
        testing::{Reference, SHAPES, check},
    };

    /// `transformers.optimization.Adafactor.step` in 64 bits, matrix by matrix.
    #[derive(Default)]
    struct Formula {
        steps: i32,
        rows: Vec<f64>,
        columns: Vec<f64>,
        whole: Vec<f64>,
        scale_parameter: bool,
    }

    fn rms(values: &[f64]) -> f64 {
        (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt()
    }

    impl Formula {
        fn change(&mut self, at: usize, shape: &[i64], g: &[f64]) -> Vec<f64> {
            let beta = 1.0 - f64::from(self.steps).powf(-0.8);
            let mix = |old: &mut f64, new: f64| *old = beta * *old + (1.0 - beta) * new;
            let [.., rows, columns] = shape else {
                return g
                    .iter()
                    .enumerate()
                    .map(|(i, g)| {
                        mix(&mut self.whole[at + i], g * g + 1e-30);
                        g / self.whole[at + i].sqrt()
                    })
                    .collect();
            };
            let (rows, columns) = (*rows as usize, *columns as usize);
            let mut change = vec![0.0; g.len()];
            for matrix in 0..g.len() / (rows * columns) {
                let base = matrix * rows * columns; // state is kept at the place of a matrix's first numbers
                let square = |r: usize, c: usize| g[base + r * columns + c].powi(2) + 1e-30;
                for r in 0..rows {
                    let mean = (0..columns).map(|c| square(r, c)).sum::<f64>() / columns as f64;
                    mix(&mut self.rows[at + base + r], mean);
                }
                for c in 0..columns {
                    let mean = (0..rows).map(|r| square(r, c)).sum::<f64>() / rows as f64;
                    mix(&mut self.columns[at + base + c], mean);
                }
                let mean = self.rows[at + base..][..rows].iter().sum::<f64>() / rows as f64;
                for r in 0..rows {
                    for c in 0..columns {
                        let second = self.rows[at + base + r] / mean * self.columns[at + base + c];
                        change[base + r * columns + c] = g[base + r * columns + c] / second.sqrt();
                    }
                }
            }
            change
        }
    }

    impl Reference for Formula {
        fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rates: &[f64]) {
            self.steps += 1;
            for state in [&mut self.rows, &mut self.columns, &mut self.whole] {
                state.resize(parameters.len(), 0.0);
            }
            let mut at = 0;
            for (shape, _) in SHAPES {
                let length = shape.iter().product::<i64>() as usize;
                let change = self.change(at, shape, &gradient[at..at + length]);
                let clip = rms(&change).max(1.0);
                let values = &mut parameters[at..at + length];
                let scale = if self.scale_parameter { rms(values).max(1e-3) } else { 1.0 };
                for (i, value) in values.iter_mut().enumerate() {
                    *value -= rates[at + i] * scale * (change[i] / clip + 0.03 * *value);
                }
                at += length;
            }
        }
    }

    #[test]
    fn adafactor_follows_its_formula_with_and_without_parameter_scaling() {
        for scale_parameter in [false, true] {
            let config = OptimizerConfig::Adafactor {
                decay_exponent: -0.8,
                clip_threshold: 1.0,
                scale_parameter,
                weight_decay: 0.03,
            };
            check(config, 1e-2, &mut Formula { scale_parameter, ..Formula::default() });
        }
    }
}
