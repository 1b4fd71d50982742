//! Several adapters into one: their sum exactly, their sum cut to a rank, or peft's sum of factors.
//!
//! | method | result | rank |
//! |---|---|---|
//! | [`Concat`](Method::Concat) | `Σ strength·ΔW`, exactly: factors stand beside each other | the sum of all |
//! | [`Svd`](Method::Svd) | the best approximation of that sum | as asked for |
//! | [`Linear`](Method::Linear) | `(Σ √w·B)·(Σ √w·A)`, `w = strength·scale`: cross terms make it differ from the sum | the common one |
//!
//! `Linear` is what peft calls `linear` (`docs/formats.md` §9). Differences of norms and biases are added in all three. What
//! is no sum of fixed matrices (DoRA, GLoRA, (IA)³, OFT) cannot be mixed: its effect depends on the base and on the order.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use crate::{
    Adapter, AnyAdapter, Array, Backend, Cpu, Error, Result,
    adapter::{Full, Lora},
    format::{AdaptedModule, AdapterFile, Component, Dtype, Strengths},
    resize::{Cut, Search, cut_difference, cut_product, factors},
};

/// How adapters on one module become one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The exact sum of low-rank updates.
    Concat,
    /// The sum, cut; without a rank and an energy, to the largest rank among the parts.
    Svd(Cut),
    /// The sums of the factors, cross terms included.
    Linear,
}

/// An adapter file and how strongly it acts.
#[derive(Debug, Clone, Copy)]
pub struct Ingredient<'a> {
    /// The adapters.
    pub file: &'a AdapterFile,
    /// What each is multiplied by.
    pub strengths: &'a Strengths,
}

/// A module of the mixture.
#[derive(Debug, Clone)]
pub struct Mixed {
    /// Its adapter.
    pub module: AdaptedModule,
    /// Share of the sum's `‖ΔW‖²` that it keeps; `None` where nothing was cut.
    pub energy: Option<f64>,
}

/// Why a module cannot be mixed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MixError {
    /// A family whose effect is no fixed matrix.
    #[error(
        "{component} module `{module}`: {family} depends on the base weight and on the order, so there is no sum of it"
    )]
    NoSum {
        /// The part of the model.
        component: Component,
        /// The module.
        module: String,
        /// The family.
        family: &'static str,
    },
    /// A family that is no pair of factors, where the method needs one.
    #[error("{component} module `{module}`: `{method}` takes LoRA alone, this is {family}")]
    NoPair {
        /// The part of the model.
        component: Component,
        /// The module.
        module: String,
        /// The family.
        family: &'static str,
        /// The method.
        method: &'static str,
    },
    /// Factors of different ranks under `linear`.
    #[error("{component} module `{module}`: `linear` adds factors of one rank, these have {ranks:?}")]
    Ranks {
        /// The part of the model.
        component: Component,
        /// The module.
        module: String,
        /// The ranks.
        ranks: Vec<usize>,
    },
    /// Adapters for weights of different shapes.
    #[error(
        "{component} module `{module}`: the adapters are for weights of shapes {shapes:?}: they belong to different bases"
    )]
    Shapes {
        /// The part of the model.
        component: Component,
        /// The module.
        module: String,
        /// The shapes.
        shapes: Vec<Vec<usize>>,
    },
    /// A sum without singular values.
    #[error("{component} module `{module}`: the sum of {} cannot be decomposed: {reason}", listed(files))]
    Indecomposable {
        /// The part of the model.
        component: Component,
        /// The module.
        module: String,
        /// The files that have it.
        files: Vec<PathBuf>,
        /// Why.
        reason: String,
    },
    /// Arithmetic that failed.
    #[error(transparent)]
    Other(#[from] crate::Error),
}

/// Mixes adapters, module by module, on all cores; modules come in the order of the first file that has them.
///
/// Strength 0 leaves a module of that file out. All files must have been read against one base, or all alone.
///
/// # Errors
/// See [`MixError`].
pub fn mix(ingredients: &[Ingredient<'_>], method: Method) -> Result<Vec<Mixed>, MixError> {
    let mut places: BTreeMap<(Component, &str), usize> = BTreeMap::new();
    let mut gathered: Vec<Vec<Part<'_>>> = Vec::new();
    for Ingredient { file, strengths } in ingredients {
        for module in &file.modules {
            let strength = strengths.of(module.component, &module.path);
            if strength != 0.0 {
                let at = *places.entry((module.component, &module.path)).or_insert_with(|| {
                    gathered.push(Vec::new());
                    gathered.len() - 1
                });
                gathered[at].push(Part { file: &file.path, module, strength });
            }
        }
    }
    let mixed: Vec<Result<Vec<Mixed>, MixError>> = gathered.par_iter().map(|parts| one(parts, method)).collect();
    Ok(mixed.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

struct Part<'a> {
    file: &'a Path,
    module: &'a AdaptedModule,
    strength: f64,
}

impl Part<'_> {
    fn lora(&self) -> Option<&Lora<Array>> {
        match &self.module.adapter {
            AnyAdapter::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    fn family(&self) -> &'static str {
        match &self.module.adapter {
            AnyAdapter::Lora(_) => "LoRA",
            AnyAdapter::Dora(_) => "DoRA",
            AnyAdapter::Loha(_) => "LoHa",
            AnyAdapter::Lokr(_) => "LoKr",
            AnyAdapter::Glora(_) => "GLoRA",
            AnyAdapter::Full(_) => "a full difference",
            AnyAdapter::Ia3(_) => "(IA)³",
            AnyAdapter::Oft(_) => "OFT",
            AnyAdapter::Boft(_) => "BOFT",
        }
    }

    /// Whether it changes the weight, rather than a bias alone.
    fn touches_weight(&self) -> bool {
        !matches!(&self.module.adapter, AnyAdapter::Full(full) if full.diff.is_none())
    }
}

/// The adapters of one module: one for the weight, and one for the bias where it has no other place.
fn one(parts: &[Part<'_>], method: Method) -> Result<Vec<Mixed>, MixError> {
    let Some(first) = parts.first().map(|part| part.module) else { return Ok(Vec::new()) };
    let place = || (first.component, first.path.clone());
    for part in parts {
        let module = part.module;
        if matches!(
            module.adapter,
            AnyAdapter::Dora(_) | AnyAdapter::Glora(_) | AnyAdapter::Ia3(_) | AnyAdapter::Oft(_) | AnyAdapter::Boft(_)
        ) {
            let (component, module) = place();
            return Err(MixError::NoSum { component, module, family: part.family() });
        }
        if !same_shape(&module.weight, &first.weight) && part.touches_weight() {
            let (component, module) = place();
            let shapes = parts.iter().map(|part| part.module.weight.clone()).collect();
            return Err(MixError::Shapes { component, module, shapes });
        }
    }
    let weights: Vec<&Part<'_>> = parts.iter().filter(|part| part.touches_weight()).collect();
    let bias = bias_sum(parts)?;
    let dtype = parts.iter().map(|part| part.module.dtype).max_by_key(|dtype| precision(*dtype)).unwrap_or(first.dtype);
    let like: &AdaptedModule = weights.first().map_or(first, |part| part.module);
    let module = |adapter| AdaptedModule {
        component: like.component,
        path: like.path.clone(),
        adapter,
        weight: like.weight.clone(),
        dtype,
        turned: like.turned,
    };
    let (lora, energy) = match weights[..] {
        [] => {
            let full = Full { diff: None, diff_bias: bias };
            return Ok(vec![Mixed { module: module(AnyAdapter::Full(full)), energy: None }]);
        }
        _ if first.weight.len() < 2
            || weights.iter().all(|part| matches!(part.module.adapter, AnyAdapter::Full(_))) =>
        {
            let full = Full { diff: Some(dense_sum(&weights)?), diff_bias: bias };
            return Ok(vec![Mixed { module: module(AnyAdapter::Full(full)), energy: None }]);
        }
        _ => weight_sum(&weights, method, place).map_err(|error| match error {
            MixError::Other(Error::Numeric { reason, .. }) => {
                let (component, module) = place();
                let files = weights.iter().map(|part| part.file.to_owned()).collect();
                MixError::Indecomposable { component, module, files, reason }
            }
            other => other,
        })?,
    };
    let up_bias = match bias {
        Some(bias) if lora.scale != 0.0 => Some(Cpu.scale(&bias, 1.0 / lora.scale)?),
        other => other,
    };
    Ok(vec![Mixed { module: module(AnyAdapter::Lora(Lora { up_bias, ..lora })), energy }])
}

fn weight_sum(
    parts: &[&Part<'_>],
    method: Method,
    place: impl Fn() -> (Component, String),
) -> Result<(Lora<Array>, Option<f64>), MixError> {
    let weight = &parts[0].module.weight;
    let no_pair = parts.iter().find(|part| part.lora().is_none());
    if let (Some(part), Method::Concat | Method::Linear) = (no_pair, method) {
        let (component, module) = place();
        let method = if method == Method::Linear { "linear" } else { "concat" };
        return Err(MixError::NoPair { component, module, family: part.family(), method });
    }
    match method {
        Method::Concat => Ok((concat(parts)?, None)),
        Method::Linear => linear(parts, place).map(|lora| (lora, None)),
        Method::Svd(cut) => {
            let loras: Vec<&Lora<Array>> = parts.iter().filter_map(|part| part.lora()).collect();
            let widest = loras.iter().filter_map(|lora| lora.down.shape.first().copied()).max().unwrap_or(32);
            let cut = match cut {
                Cut { rank: None, energy: None } => Cut { rank: NonZeroUsize::new(widest), energy: None },
                said => said,
            };
            let (lora, _, energy) = match no_pair {
                None => {
                    let sum = concat(parts)?;
                    let (up, down) = factors(&sum, weight)?;
                    cut_product(&up, &down, weight, cut)?
                }
                Some(_) => cut_difference(dense_sum(parts)?, cut, Search::Randomised)?,
            };
            Ok((lora, Some(energy)))
        }
    }
}

/// `[w₁·B₁, w₂·B₂, …]·[A₁; A₂; …]`. The first part's `strength·scale` becomes the scale, so that factors of parts which
/// count alike keep their bits.
fn concat(parts: &[&Part<'_>]) -> Result<Lora<Array>> {
    let weight = &parts[0].module.weight;
    let (mut ups, mut downs, mut scale) = (Vec::new(), Vec::new(), None);
    for part in parts {
        let Some(lora) = part.lora() else { continue };
        let product = part.strength * lora.scale;
        let (up, down) = factors(&Lora { scale: 1.0, ..lora.clone() }, weight)?;
        let common = match scale {
            None if product != 0.0 => *scale.insert(product),
            None => 1.0,
            Some(common) => common,
        };
        ups.push(if product == common { up } else { Cpu.scale(&up, product / common)? });
        downs.push(down);
    }
    let (up, down) = (Cpu.concat(&ups, 1)?, Cpu.concat(&downs, 0)?);
    let rank = down.shape[0];
    let down_shape: Vec<usize> = std::iter::once(rank).chain(weight.iter().skip(1).copied()).collect();
    let up_shape: Vec<usize> = [up.shape[0], rank].into_iter().chain(weight.iter().skip(2).map(|_| 1)).collect();
    Ok(Lora::new(Cpu.reshape(&down, &down_shape)?, Cpu.reshape(&up, &up_shape)?, scale.unwrap_or(0.0)))
}

/// peft's sum of factors under the square roots of strength times scale; a negative product turns the sign of `A`.
fn linear(parts: &[&Part<'_>], place: impl Fn() -> (Component, String)) -> Result<Lora<Array>, MixError> {
    let weight = &parts[0].module.weight;
    let mut sum: Option<(Array, Array)> = None;
    let pairs = parts.iter().filter_map(|part| Some((part.lora()?, part.strength)));
    let pairs: Vec<(Array, Array, f64)> = pairs
        .map(|(lora, strength)| {
            let (up, down) = factors(&Lora { scale: 1.0, ..lora.clone() }, weight)?;
            Ok((up, down, strength * lora.scale))
        })
        .collect::<Result<_>>()?;
    let ranks: Vec<usize> = pairs.iter().map(|(_, down, _)| down.shape[0]).collect();
    if ranks.windows(2).any(|pair| pair[0] != pair[1]) {
        let (component, module) = place();
        return Err(MixError::Ranks { component, module, ranks });
    }
    for (up, down, product) in pairs {
        let root = product.abs().sqrt();
        let (up, down) = (Cpu.scale(&up, root)?, Cpu.scale(&down, root * product.signum())?);
        sum = Some(match sum {
            None => (up, down),
            Some((ups, downs)) => (Cpu.add(&ups, &up)?, Cpu.add(&downs, &down)?),
        });
    }
    let (up, down) = sum.unwrap_or_else(|| (Array::full([1, 1], 0.0), Array::full([1, 1], 0.0)));
    let whole = Lora::new(down, up, 1.0);
    let down_shape: Vec<usize> = std::iter::once(ranks[0]).chain(weight.iter().skip(1).copied()).collect();
    let up_shape: Vec<usize> =
        [whole.up.shape[0], ranks[0]].into_iter().chain(weight.iter().skip(2).map(|_| 1)).collect();
    Ok(Lora::new(Cpu.reshape(&whole.down, &down_shape)?, Cpu.reshape(&whole.up, &up_shape)?, 1.0))
}

/// `Σ strength·ΔW`, formed.
fn dense_sum(parts: &[&Part<'_>]) -> Result<Array> {
    let shape = &parts[0].module.weight;
    let zero = Array::full(shape.clone(), 0.0);
    parts.iter().try_fold(zero.clone(), |sum, part| {
        Cpu.add(&sum, &Cpu.reshape(&part.module.adapter.change(&Cpu, &zero, part.strength)?, shape)?)
    })
}

/// What all of them add to the bias.
fn bias_sum(parts: &[Part<'_>]) -> Result<Option<Array>> {
    parts.iter().try_fold(None, |sum: Option<Array>, part| {
        let change = Adapter::<Cpu>::bias_change(&part.module.adapter, &Cpu, None, part.strength)?;
        match (sum, change) {
            (Some(sum), Some(change)) => Ok(Some(Cpu.add(&sum, &Cpu.reshape(&change, &sum.shape)?)?)),
            (sum, change) => Ok(sum.or(change)),
        }
    })
}

/// Whether two weights are one, unit axes aside.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let long = |shape: &[usize]| shape.iter().copied().filter(|length| *length != 1).collect::<Vec<_>>();
    long(a) == long(b)
}

fn listed(files: &[PathBuf]) -> String {
    files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" and ")
}

/// The bits that a type keeps of a number.
fn precision(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 => 53,
        Dtype::F32 => 24,
        Dtype::F16 => 11,
        Dtype::Bf16 => 8,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Draw, Purpose,
        adapter::Loha,
        format::{Dialect, Reason, Warning},
    };
    use proptest::prelude::*;

    const WEIGHT: [usize; 4] = [5, 6, 3, 3];

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(6, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
        Array::new(shape, values).unwrap()
    }

    fn lora(sample: u32, rank: usize, scale: f64) -> Lora<Array> {
        Lora::new(numbers(sample, &[rank, 6, 3, 3]), numbers(sample + 1, &[5, rank, 1, 1]), scale)
    }

    fn file(modules: Vec<(&str, &[usize], AnyAdapter<Array>)>) -> AdapterFile {
        let module = |(path, weight, adapter): (&str, &[usize], _)| AdaptedModule {
            component: Component::Unet,
            path: path.to_owned(),
            adapter,
            weight: weight.to_vec(),
            dtype: Dtype::F16,
            turned: false,
        };
        AdapterFile {
            path: "x".into(),
            dialect: Dialect::Kohya,
            modules: modules.into_iter().map(module).collect(),
            replacements: Vec::new(),
            embeddings: Vec::new(),
            unapplied: Vec::<(String, Reason)>::new(),
            warnings: Vec::<Warning>::new(),
            metadata: BTreeMap::new(),
            keys: 0,
        }
    }

    fn delta(adapter: &AnyAdapter<Array>, strength: f64) -> Array {
        adapter.change(&Cpu, &Array::full(WEIGHT, 0.0), strength).unwrap()
    }

    fn distance(a: &Array, b: &Array) -> f32 {
        a.values.iter().zip(&b.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// Both files with their strengths, mixed.
    fn mixed(files: [&AdapterFile; 2], strengths: [f64; 2], method: Method) -> Result<Vec<Mixed>, MixError> {
        let strengths = strengths.map(Strengths::all);
        let ingredients = [0, 1].map(|index| Ingredient { file: files[index], strengths: &strengths[index] });
        mix(&ingredients, method)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn concatenation_is_the_sum_and_so_is_an_svd_that_cuts_nothing(
            sample in 0_u32..1000, ranks in [1_usize..5, 1_usize..5], scales in [-2.0_f64..2.0, -2.0_f64..2.0],
            strengths in [-2.0_f64..2.0, 0.1_f64..2.0],
        ) {
            let [one, two] = [0, 1].map(|index| lora(sample + 2000 * index as u32, ranks[index], scales[index]));
            let [one, two] = [one, two].map(|lora| file(vec![("m", &WEIGHT, AnyAdapter::Lora(lora))]));
            let parts = [&one, &two].map(|file| &file.modules[0].adapter);
            let sum = Cpu.add(&delta(parts[0], strengths[0]), &delta(parts[1], strengths[1])).unwrap();
            for method in [Method::Concat, Method::Svd(Cut { rank: None, energy: Some(1.0) })] {
                let mixed = mixed([&one, &two], strengths, method).unwrap();
                let error = distance(&delta(&mixed[0].module.adapter, 1.0), &sum);
                prop_assert!(error < 2e-4, "{method:?}: {error}");
            }
        }
    }

    #[test]
    fn parts_that_count_alike_keep_their_bits_and_ranks_add_up() {
        let (one, two) = (lora(1, 2, 0.5), lora(3, 3, 0.5));
        let files = [&one, &two].map(|lora| file(vec![("m", &WEIGHT, AnyAdapter::Lora(lora.clone()))]));
        let mixed = mixed([&files[0], &files[1]], [0.8, 0.8], Method::Concat).unwrap();
        let AnyAdapter::Lora(sum) = &mixed[0].module.adapter else { panic!() };
        assert_eq!((sum.scale, &*sum.down.shape, &*sum.up.shape), (0.4, &[5, 6, 3, 3][..], &[5, 5, 1, 1][..]));
        assert_eq!(sum.down.values, [one.down.values, two.down.values].concat());
        assert_eq!(Cpu.narrow(&sum.up, 1, 0, 2).unwrap().values, one.up.values);
    }

    #[test]
    fn a_sum_of_factors_has_cross_terms() {
        let pair = |down: [f32; 2], up: [f32; 2]| {
            Lora::new(Array::new([1, 2], down.to_vec()).unwrap(), Array::new([2, 1], up.to_vec()).unwrap(), 1.0)
        };
        let (one, two) = (pair([1.0, 0.0], [1.0, 0.0]), pair([0.0, 1.0], [0.0, 1.0]));
        let files = [one, two].map(|lora| file(vec![("m", &[2, 2], AnyAdapter::Lora(lora))]));
        let mixed = mixed([&files[0], &files[1]], [1.0, 4.0], Method::Linear).unwrap();
        let delta = mixed[0].module.adapter.delta(&Cpu, &Array::full([2, 2], 0.0)).unwrap();
        // (√1·e₁ + √4·e₂)(√1·e₁ + √4·e₂)ᵀ, where the sum would be diag(1, 4).
        assert_eq!(delta.values, [1.0, 2.0, 2.0, 4.0]);
        let wide = file(vec![("m", &WEIGHT, AnyAdapter::Lora(lora(1, 2, 1.0)))]);
        let wider = file(vec![("m", &WEIGHT, AnyAdapter::Lora(lora(3, 3, 1.0)))]);
        let error = super::tests::mixed([&wide, &wider], [1.0, 1.0], Method::Linear).unwrap_err();
        assert!(matches!(error, MixError::Ranks { ranks, .. } if ranks == [2, 3]));
    }

    #[test]
    fn modules_of_one_file_alone_and_differences_of_norms_come_along() {
        let full = |values: &[f32]| {
            AnyAdapter::Full(Full { diff: Some(Array::new([2], values.to_vec()).unwrap()), diff_bias: None })
        };
        let one = file(vec![("m", &WEIGHT, AnyAdapter::Lora(lora(1, 2, 1.0))), ("n", &[2], full(&[1.0, 2.0]))]);
        let two = file(vec![("n", &[2], full(&[10.0, 0.0])), ("o", &WEIGHT, AnyAdapter::Lora(lora(3, 2, 1.0)))]);
        let result = mixed([&one, &two], [1.0, 0.5], Method::Concat).unwrap();
        let paths: Vec<_> = result.iter().map(|mixed| &*mixed.module.path).collect();
        assert_eq!(paths, ["m", "n", "o"]);
        let AnyAdapter::Full(sum) = &result[1].module.adapter else { panic!() };
        assert_eq!(sum.diff.as_ref().unwrap().values, [6.0, 2.0]);
        let AnyAdapter::Lora(alone) = &result[2].module.adapter else { panic!() };
        assert_eq!(alone.scale, 0.5);
        assert_eq!(mixed([&one, &two], [0.0, 0.5], Method::Concat).unwrap().len(), 2);
    }

    #[test]
    fn what_has_no_sum_or_no_pair_is_refused_and_what_has_a_difference_is_cut() {
        let half = |sample| (numbers(sample, &[5, 2]), numbers(sample + 1, &[2, 54]));
        let ((w1_a, w1_b), (w2_a, w2_b)) = (half(4), half(6));
        let loha = AnyAdapter::Loha(Loha { w1_a, w1_b, w2_a, w2_b, t1: None, t2: None, scale: 0.5 });
        let pair = AnyAdapter::Lora(lora(1, 2, 1.0));
        let files = [&loha, &pair].map(|adapter| file(vec![("m", &WEIGHT, adapter.clone())]));
        let error = mixed([&files[0], &files[1]], [1.0, 1.0], Method::Concat).unwrap_err();
        assert_eq!(error.to_string(), "unet module `m`: `concat` takes LoRA alone, this is LoHa");
        let cut = Method::Svd(Cut { rank: NonZeroUsize::new(5), energy: None });
        let mixed_up = mixed([&files[0], &files[1]], [1.0, -1.0], cut).unwrap();
        let sum = Cpu.add(&delta(&loha, 1.0), &delta(&pair, -1.0)).unwrap();
        assert!(distance(&delta(&mixed_up[0].module.adapter, 1.0), &sum) < 1e-3);
        assert!(mixed_up[0].energy.unwrap() > 0.9999);
        let ia3 = AnyAdapter::Ia3(crate::adapter::Ia3 {
            vector: numbers(9, &[5]),
            axis: crate::adapter::Axis::Output,
            kind: crate::adapter::Ia3Kind::Offset,
        });
        let odd = file(vec![("m", &WEIGHT, ia3)]);
        assert!(matches!(mixed([&files[1], &odd], [1.0, 1.0], cut), Err(MixError::NoSum { .. })));
        let other =
            file(vec![("m", &[4, 6], AnyAdapter::Lora(Lora::new(numbers(1, &[2, 6]), numbers(2, &[4, 2]), 1.0)))]);
        assert!(matches!(mixed([&files[1], &other], [1.0, 1.0], cut), Err(MixError::Shapes { .. })));
    }
}
