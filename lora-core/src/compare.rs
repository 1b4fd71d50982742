//! Two adapter files side by side: which modules only one has, and how far apart the updates of the others are.
//!
//! The distance of two low-rank updates needs no ΔW: with `D = [B₁, −B₂]·[A₁; A₂]`, `‖D‖² = Σ (BᵀB ⊙ A·Aᵀ)` over Gram
//! matrices as wide as both ranks together, in `f64`. What depends on the base weight (DoRA, GLoRA, (IA)³, OFT) is compared
//! by what it makes of that weight, if its numbers are there, and by its factors otherwise. Files of different dialects compare
//! equal if their updates do.

use std::collections::BTreeMap;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::{
    Adapter, AnyAdapter, Array, Backend, Cpu, Part, Result,
    adapter::{Direction, Dora, Lora},
    format::{AdaptedModule, AdapterFile, BaseModel, Component, Dtype},
    resize::factors,
};

/// What differs between two files.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Modules that the first file alone has.
    pub only_first: Vec<(Component, String)>,
    /// Modules that the second file alone has.
    pub only_second: Vec<(Component, String)>,
    /// The modules of both.
    pub common: Vec<ModuleComparison>,
    /// Metadata that differs: the key, and what each file has.
    pub metadata: Vec<(String, Option<String>, Option<String>)>,
}

/// One module of both files.
#[derive(Debug, Clone)]
pub struct ModuleComparison {
    /// The part of the model.
    pub component: Component,
    /// The module.
    pub path: String,
    /// `‖ΔW₁ − ΔW₂‖` over the larger of the two norms: 0 the same, 1 if one is nothing, 2 opposite; `None` if they cannot be
    /// compared, since they are for weights of different shapes or depend on base weights that are not there.
    pub distance: Option<f64>,
    /// `‖ΔW‖` of both, where they are fixed matrices or the base weight is there.
    pub norms: Option<[f64; 2]>,
    /// What each is.
    pub sides: [Side; 2],
}

/// What one file has for a module.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// The family.
    pub family: &'static str,
    /// The rank, of the families that have one.
    pub rank: Option<usize>,
    /// Numerator of the scale, of the same.
    pub alpha: Option<f64>,
    /// How the factors are stored.
    pub dtype: Dtype,
}

impl Comparison {
    /// Whether both files have the same modules and no distance is larger than `tolerance`. Metadata has no say.
    pub fn is_same_update(&self, tolerance: f64) -> bool {
        self.only_first.is_empty()
            && self.only_second.is_empty()
            && self.common.iter().all(|module| module.distance.is_some_and(|distance| distance <= tolerance))
    }
}

/// Compares two files that were read against one base, or both alone; the numbers of `base`, where it has some, tell what
/// updates come to that depend on them.
///
/// # Errors
/// If the factors of a module do not fit each other, or a base weight cannot be read.
pub fn compare(first: &AdapterFile, second: &AdapterFile, base: Option<&BaseModel>) -> Result<Comparison> {
    let [ours, theirs] = [first, second].map(by_place);
    let missing = |from: &Places<'_>, of: &Places<'_>| {
        of.keys()
            .filter(|place| !from.contains_key(*place))
            .map(|(component, path)| (*component, (*path).to_owned()))
            .collect()
    };
    let shared: Vec<_> = ours.iter().filter_map(|(place, one)| Some((place, one, theirs.get(place)?))).collect();
    let compared: Vec<Result<ModuleComparison>> = shared
        .par_iter()
        .map(|((component, path), one, two)| {
            let (distance, norms) = distance(one, two, base)?;
            let sides = [side(one), side(two)];
            Ok(ModuleComparison { component: *component, path: (*path).to_owned(), distance, norms, sides })
        })
        .collect();
    Ok(Comparison {
        only_first: missing(&theirs, &ours),
        only_second: missing(&ours, &theirs),
        common: compared.into_iter().collect::<Result<_>>()?,
        metadata: metadata(&first.metadata, &second.metadata),
    })
}

/// The adapters of every module; a difference of a bias may stand beside another.
type Places<'a> = BTreeMap<(Component, &'a str), Vec<&'a AdaptedModule>>;

fn by_place(file: &AdapterFile) -> Places<'_> {
    let mut places = Places::new();
    for module in &file.modules {
        places.entry((module.component, &module.path)).or_default().push(module);
    }
    places
}

/// Distance and norms of what two files do to one module: the farthest of its parts counts.
fn distance(
    one: &[&AdaptedModule],
    two: &[&AdaptedModule],
    base: Option<&BaseModel>,
) -> Result<(Option<f64>, Option<[f64; 2]>)> {
    if one.len() != two.len() {
        return Ok((None, None));
    }
    let mut farthest: Option<(f64, Option<[f64; 2]>)> = None;
    for (one, two) in one.iter().zip(two) {
        let on_base = match base {
            Some(base) if !is_fixed(&one.adapter) || !is_fixed(&two.adapter) => distance_on(base, one, two)?,
            _ => None,
        };
        let known = match on_base {
            Some(known) => Some(known),
            None => part_distance(one, two)?,
        };
        let Some((distance, norms)) = known else { return Ok((None, None)) };
        if farthest.is_none_or(|(so_far, _)| distance > so_far) {
            farthest = Some((distance, norms));
        }
    }
    Ok(farthest.map_or((None, None), |(distance, norms)| (Some(distance), norms)))
}

/// The distance of what both make of the base weight; `None` without its numbers.
fn distance_on(base: &BaseModel, one: &AdaptedModule, two: &AdaptedModule) -> Result<Option<(f64, Option<[f64; 2]>)>> {
    if one.weight != two.weight {
        return Ok(None);
    }
    let Some(weight) = base.read(one.component, &format!("{}.weight", one.path))? else { return Ok(None) };
    let bias = base.read(one.component, &format!("{}.bias", one.path))?;
    let delta = |adapter: &AnyAdapter<Array>| match adapter {
        AnyAdapter::Full(full) if full.diff.is_none() => Ok(Vec::new()),
        other => other.delta(&Cpu, &weight).map(|delta| delta.values),
    };
    let bias_of = |adapter: &AnyAdapter<Array>| -> Result<Vec<f32>> {
        let change = Adapter::<Cpu>::bias_change(adapter, &Cpu, bias.as_ref(), 1.0)?;
        Ok(change.map(|change| change.values).unwrap_or_default())
    };
    let (a, b) = (delta(&one.adapter)?, delta(&two.adapter)?);
    let distance = relative(&a, &b).zip(relative(&bias_of(&one.adapter)?, &bias_of(&two.adapter)?));
    Ok(distance.map(|(weight, bias)| (weight.max(bias), Some([norm(&a), norm(&b)]))))
}

fn part_distance(one: &AdaptedModule, two: &AdaptedModule) -> Result<Option<(f64, Option<[f64; 2]>)>> {
    let elements = |module: &AdaptedModule| module.weight.iter().product::<usize>();
    if elements(one) != elements(two) || one.weight.first() != two.weight.first() {
        return Ok(None);
    }
    match (&one.adapter, &two.adapter) {
        (AnyAdapter::Lora(a), AnyAdapter::Lora(b)) => {
            let bias = relative(&bias(&one.adapter)?, &bias(&two.adapter)?).unwrap_or(f64::INFINITY);
            let (distance, norms) = product_distance(a, b, one)?;
            Ok(Some((distance.max(bias), Some(norms))))
        }
        (AnyAdapter::Dora(a), AnyAdapter::Dora(b)) => {
            // What the magnitudes do depends on the base: direction and magnitudes are compared each by itself. The rules
            // differ at strengths other than 1 alone.
            let magnitude = match a.axis == b.axis {
                true => relative(&a.magnitude.values, &b.magnitude.values),
                false => None,
            };
            let direction = direction_distance(a, b, one)?;
            Ok(direction.zip(magnitude).map(|(direction, magnitude)| (direction.max(magnitude), None)))
        }
        (a, b) if is_fixed(a) && is_fixed(b) => {
            let zero = Array::full(one.weight.clone(), 0.0);
            let delta = |adapter: &AnyAdapter<Array>| match adapter {
                AnyAdapter::Full(full) if full.diff.is_none() => Ok(Vec::new()),
                other => other.delta(&Cpu, &zero).map(|delta| delta.values),
            };
            let (a_delta, b_delta) = (delta(a)?, delta(b)?);
            let distance = relative(&a_delta, &b_delta).zip(relative(&bias(a)?, &bias(b)?));
            Ok(distance.map(|(weight, bias)| (weight.max(bias), Some([norm(&a_delta), norm(&b_delta)]))))
        }
        (a, b) => Ok(factor_distance(a, b).map(|distance| (distance, None))),
    }
}

/// `‖B₁A₁ − B₂A₂‖` over the larger norm, and both norms.
fn product_distance(a: &Lora<Array>, b: &Lora<Array>, module: &AdaptedModule) -> Result<(f64, [f64; 2])> {
    let ((up_a, down_a), (up_b, down_b)) = (factors(a, &module.weight)?, factors(b, &module.weight)?);
    let norms = [product_norm(&up_a, &down_a), product_norm(&up_b, &down_b)];
    let same = up_a == up_b && down_a == down_b;
    let distance = match same {
        true => 0.0,
        false => {
            let up = Cpu.concat(&[up_a, Cpu.scale(&up_b, -1.0)?], 1)?;
            product_norm(&up, &Cpu.concat(&[down_a, down_b], 0)?)
        }
    };
    let larger = norms[0].max(norms[1]);
    Ok((if larger > 0.0 { distance / larger } else { 0.0 }, norms))
}

/// `‖up·down‖` from the Gram matrices of `up` `[m, r]` and `down` `[r, n]`.
fn product_norm(up: &Array, down: &Array) -> f64 {
    let wide = |array: &Array| {
        let (rows, columns) = (array.shape[0], array.shape[1]);
        let matrix = MatRef::from_row_major_slice(&array.values, rows, columns);
        Mat::from_fn(rows, columns, |row, column| f64::from(matrix[(row, column)]))
    };
    let (up, down) = (wide(up), wide(down));
    let (up, down) = (up.transpose() * &up, &down * down.transpose()); // [r, r]
    let sum: f64 = (0..up.ncols()).map(|column| up.col(column).transpose() * down.col(column)).sum();
    sum.max(0.0).sqrt()
}

fn direction_distance(a: &Dora<Array>, b: &Dora<Array>, module: &AdaptedModule) -> Result<Option<f64>> {
    let whole = |direction: &Direction<Array>| match direction {
        Direction::Lora(lora) => AnyAdapter::Lora(lora.clone()),
        Direction::Loha(loha) => AnyAdapter::Loha(loha.clone()),
        Direction::Lokr(lokr) => AnyAdapter::Lokr(lokr.clone()),
    };
    let [a, b] = [a, b].map(|dora| AdaptedModule { adapter: whole(&dora.direction), ..module.clone() });
    Ok(part_distance(&a, &b)?.map(|(distance, _)| distance))
}

/// Distance of the factors themselves, of families that depend on the base: equal ones have equal effects.
fn factor_distance(a: &AnyAdapter<Array>, b: &AnyAdapter<Array>) -> Option<f64> {
    let list = |adapter| -> Vec<(Part, &Array)> { Adapter::<Cpu>::factors(adapter) };
    let (a, b) = (list(a), list(b));
    if a.len() != b.len() || a.iter().zip(&b).any(|((part, _), (other, _))| part != other) {
        return None;
    }
    a.iter()
        .zip(&b)
        .map(|((_, a), (_, b))| relative(&a.values, &b.values))
        .try_fold(0.0, |most: f64, one| Some(most.max(one?)))
}

/// Whether ΔW is the same whatever the base.
fn is_fixed(adapter: &AnyAdapter<Array>) -> bool {
    matches!(adapter, AnyAdapter::Lora(_) | AnyAdapter::Loha(_) | AnyAdapter::Lokr(_) | AnyAdapter::Full(_))
}

fn bias(adapter: &AnyAdapter<Array>) -> Result<Vec<f32>> {
    let change = Adapter::<Cpu>::bias_change(adapter, &Cpu, None, 1.0)?;
    Ok(change.map(|change| change.values).unwrap_or_default())
}

/// `‖a − b‖` over the larger norm; nothing counts as zeros, and `None` are lengths that differ.
fn relative(a: &[f32], b: &[f32]) -> Option<f64> {
    let larger = norm(a).max(norm(b));
    let off = match (a.len(), b.len()) {
        (0, _) => norm(b),
        (_, 0) => norm(a),
        (one, two) if one == two => {
            a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
        }
        _ => return None,
    };
    Some(if larger > 0.0 { off / larger } else { 0.0 })
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

fn side(modules: &[&AdaptedModule]) -> Side {
    // What acts on the weight says more than what stands beside it.
    let main = modules.iter().find(|module| !matches!(module.adapter, AnyAdapter::Full(_))).or(modules.first());
    let family = match main.map(|module| &module.adapter) {
        Some(AnyAdapter::Lora(_)) => "LoRA",
        Some(AnyAdapter::Dora(_)) => "DoRA",
        Some(AnyAdapter::Loha(_)) => "LoHa",
        Some(AnyAdapter::Lokr(_)) => "LoKr",
        Some(AnyAdapter::Glora(_)) => "GLoRA",
        Some(AnyAdapter::Ia3(_)) => "(IA)³",
        Some(AnyAdapter::Oft(_)) => "OFT",
        Some(AnyAdapter::Boft(_)) => "BOFT",
        Some(AnyAdapter::Full(_)) | None => "full difference",
    };
    let rank = main.and_then(|module| module.adapter.rank());
    let scale = main.map(|module| Adapter::<Cpu>::scale(&module.adapter));
    let alpha = rank.zip(scale).map(|(rank, scale)| scale * rank as f64);
    Side { family, rank, alpha, dtype: main.map_or(Dtype::F32, |module| module.dtype) }
}

fn metadata(
    first: &BTreeMap<String, String>,
    second: &BTreeMap<String, String>,
) -> Vec<(String, Option<String>, Option<String>)> {
    let mut keys: Vec<&String> = first.keys().chain(second.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .filter(|key| first.get(*key) != second.get(*key))
        .map(|key| (key.clone(), first.get(key).cloned(), second.get(key).cloned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Draw, Purpose, format::Dialect};

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(8, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
        Array::new(shape, values).unwrap()
    }

    fn file(modules: Vec<(&str, AnyAdapter<Array>)>, note: &str) -> AdapterFile {
        let module = |(path, adapter): (&str, _)| AdaptedModule {
            component: Component::Unet,
            path: path.to_owned(),
            adapter,
            weight: vec![20, 30],
            dtype: Dtype::F32,
            turned: false,
        };
        AdapterFile {
            path: "x".into(),
            dialect: Dialect::Kohya,
            modules: modules.into_iter().map(module).collect(),
            replacements: Vec::new(),
            embeddings: Vec::new(),
            unapplied: Vec::new(),
            warnings: Vec::new(),
            metadata: BTreeMap::from([("note".to_owned(), note.to_owned()), ("same".to_owned(), String::new())]),
            keys: 0,
        }
    }

    fn lora(sample: u32, rank: usize, scale: f64) -> Lora<Array> {
        Lora::new(numbers(sample, &[rank, 30]), numbers(sample + 1, &[20, rank]), scale)
    }

    /// The distance of two adapters, through files.
    fn distance(a: AnyAdapter<Array>, b: AnyAdapter<Array>) -> Option<f64> {
        compare(&file(vec![("m", a)], ""), &file(vec![("m", b)], ""), None).unwrap().common[0].distance
    }

    #[test]
    fn the_distance_is_that_of_the_formed_updates() {
        let (a, b) = (lora(1, 4, 0.5), lora(3, 7, -1.5));
        let zero = Array::full([20, 30], 0.0);
        let formed = [&a, &b].map(|lora| lora.delta(&Cpu, &zero).unwrap().values);
        let expected = relative(&formed[0], &formed[1]).unwrap();
        let got = distance(AnyAdapter::Lora(a.clone()), AnyAdapter::Lora(b)).unwrap();
        assert!((got - expected).abs() < 1e-6, "{got} and {expected}");
        let opposite = Lora { scale: -0.5, ..a.clone() };
        assert!((distance(AnyAdapter::Lora(a.clone()), AnyAdapter::Lora(opposite)).unwrap() - 2.0).abs() < 1e-6);
        // Other factors, the same product: one doubled, the other halved, the scale somewhere else.
        let other = Lora::new(Cpu.scale(&a.down, 3.0).unwrap(), Cpu.scale(&a.up, 0.5 / 3.0).unwrap(), 1.0);
        assert!(distance(AnyAdapter::Lora(a.clone()), AnyAdapter::Lora(other)).unwrap() < 1e-6);
        assert_eq!(distance(AnyAdapter::Lora(a.clone()), AnyAdapter::Lora(a)), Some(0.0));
    }

    #[test]
    fn modules_of_one_file_and_metadata_are_listed() {
        let pair = |sample| AnyAdapter::Lora(lora(sample, 2, 0.5));
        let one = file(vec![("m", pair(1)), ("n", pair(2))], "first");
        let two = file(vec![("n", pair(2)), ("o", pair(3))], "second");
        let result = compare(&one, &two, None).unwrap();
        assert_eq!(result.only_first, [(Component::Unet, "m".to_owned())]);
        assert_eq!(result.only_second, [(Component::Unet, "o".to_owned())]);
        assert_eq!(result.common[0].distance, Some(0.0));
        assert_eq!((result.common[0].sides[0].rank, result.common[0].sides[0].alpha), (Some(2), Some(1.0)));
        assert_eq!(result.metadata, [("note".to_owned(), Some("first".to_owned()), Some("second".to_owned()))]);
        assert!(!result.is_same_update(1.0) && compare(&one, &one, None).unwrap().is_same_update(0.0));
    }

    #[test]
    fn families_that_are_fixed_matrices_compare_with_each_other() {
        let pair = lora(1, 2, 0.5);
        let diff = pair.delta(&Cpu, &Array::full([20, 30], 0.0)).unwrap();
        let full = AnyAdapter::Full(crate::adapter::Full { diff: Some(diff), diff_bias: None });
        assert!(distance(AnyAdapter::Lora(pair.clone()), full).unwrap() < 1e-6);
        let with_bias = Lora { up_bias: Some(Array::full([20], 1.0)), ..pair.clone() };
        assert_eq!(distance(AnyAdapter::Lora(pair), AnyAdapter::Lora(with_bias)), Some(1.0));
    }
}
