//! Reading the tensors of a group: finite floats, single numbers, scales and magnitudes, and the faults of all of them.

use super::{Assembled, Group, elements, key};
use crate::{
    Array, Error, Result,
    adapter::{Axis, StrengthRule},
    format::{Dtype, Fault, Misfit, Role, header::count},
};

impl Group<'_> {
    /// What multiplies the product: `alpha / rank`, or what a configuration or an override says; 1 if nothing does.
    pub(super) fn scale(&self, rank: usize, result: &mut Assembled) -> Result<f64> {
        let alpha = self.alpha()?;
        let scale = match (self.number(Role::Scale)?, alpha) {
            (Some(scale), _) => scale,
            (None, Some(alpha)) => alpha / rank as f64,
            (None, None) => self.config.map_or(1.0, |config| config.scale(&self.names(), Some(rank))),
        };
        if alpha == Some(0.0) {
            result.alpha_is_zero = Some(self.key(Role::Alpha));
        }
        Ok(scale * self.scalar()?)
    }

    pub(super) fn scalar(&self) -> Result<f64> {
        Ok(self.number(Role::Scalar)?.unwrap_or(1.0))
    }

    pub(super) fn alpha(&self) -> Result<Option<f64>> {
        self.number(Role::Alpha)
    }

    pub(super) fn magnitude(&self, turned: bool) -> Result<Option<(Array, Axis, StrengthRule)>> {
        if let Some(magnitude) = self.take(Role::PeftMagnitude)? {
            let axis = if turned { Axis::Input } else { Axis::Output };
            self.check_length(Role::PeftMagnitude, &magnitude, axis)?;
            return Ok(Some((magnitude, axis, StrengthRule::KeepMagnitudes)));
        }
        let Some(magnitude) = self.take(Role::DoraScale)? else { return Ok(None) };
        let [out, inner] = [0, 1].map(|axis| self.module.weight.get(axis).copied().unwrap_or(1));
        let axis = match magnitude.shape[..] {
            [length] if (length == out) != (length == inner) => {
                if length == out {
                    Axis::Output
                } else {
                    Axis::Input
                }
            }
            [length, ref rest @ ..] if length == out && !rest.is_empty() && rest.iter().all(|length| *length == 1) => {
                Axis::Output
            }
            [1, length, ref rest @ ..] if length == inner && rest.iter().all(|length| *length == 1) => Axis::Input,
            _ => {
                let problem = "magnitudes run along the module's output or its input";
                return Err(self.misfit(Role::DoraScale, &magnitude, None, problem));
            }
        };
        Ok(Some((magnitude, axis, StrengthRule::Interpolate)))
    }

    pub(super) fn refuse_magnitude(&self, family: &str) -> Result<()> {
        match self.keys.get(&Role::DoraScale).or_else(|| self.keys.get(&Role::PeftMagnitude)) {
            None => Ok(()),
            Some(key) => Err(self.fault(Fault::Unsupported {
                key: (*key).to_owned(),
                reason: format!("magnitudes over {family} have no known meaning"),
            })),
        }
    }

    pub(super) fn check_length(&self, role: Role, vector: &Array, axis: Axis) -> Result<()> {
        let length = self.module.weight.get(if axis == Axis::Output { 0 } else { 1 });
        if length == Some(&elements(vector)) {
            return Ok(());
        }
        let problem = match axis {
            Axis::Output => "its length is not the module's output",
            Axis::Input => "its length is not the module's input",
        };
        Err(self.misfit(role, vector, None, problem))
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.keys.contains_key(&role)
    }

    pub(super) fn need(&self, role: Role) -> Result<Array> {
        self.take(role)?.ok_or_else(|| self.missing(role))
    }

    /// A tensor of finite floating-point numbers.
    pub(super) fn take(&self, role: Role) -> Result<Option<Array>> {
        let Some(key) = self.keys.get(&role) else { return Ok(None) };
        let dtype = self.dtype(key);
        if !dtype.is_float() {
            return Err(self.fault(Fault::NotFloat { key: (*key).to_owned(), dtype }));
        }
        let array = self.file.array(key)?;
        if !array.is_finite() {
            let value = array.values.iter().find(|value| !value.is_finite()).unwrap_or(&f32::NAN);
            return Err(self.fault(Fault::NotFinite { key: (*key).to_owned(), value: f64::from(*value) }));
        }
        if array.shape.is_empty() {
            return Err(self.misfit(role, &array, None, "a single number is no factor"));
        }
        Ok(Some(array))
    }

    /// A tensor of one finite number, of whatever type and shape.
    pub(super) fn number(&self, role: Role) -> Result<Option<f64>> {
        let Some(key) = self.keys.get(&role) else { return Ok(None) };
        let numbers = self.file.doubles(key)?;
        let [number] = numbers[..] else {
            let shape = self.file.info(key).map(|info| info.shape.clone()).unwrap_or_default();
            return Err(self.fault(Fault::NotScalar { key: (*key).to_owned(), shape }));
        };
        if !number.is_finite() {
            return Err(self.fault(Fault::NotFinite { key: (*key).to_owned(), value: number }));
        }
        Ok(Some(number))
    }

    pub(super) fn dtype(&self, key: &str) -> Dtype {
        self.file.info(key).map_or(Dtype::F32, |info| info.dtype)
    }

    pub(super) fn rank(&self, role: Role, factor: &Array) -> Result<usize> {
        match factor.shape.first() {
            Some(rank) if elements(factor) > 0 => Ok(*rank),
            _ => Err(self.fault(Fault::RankZero { key: self.key(role), shape: factor.shape.clone() })),
        }
    }

    /// `[out, everything else]`.
    pub(super) fn sizes(&self) -> [usize; 2] {
        match self.module.weight.split_first() {
            Some((out, rest)) => [*out, count(rest)],
            None => [0, 0],
        }
    }

    /// The names under which a configuration may know the module.
    pub(super) fn names(&self) -> Vec<&str> {
        let bare = ["text_model.", "base_model.model."].into_iter().filter_map(|start| self.path.strip_prefix(start));
        std::iter::once(self.path).chain(bare).collect()
    }

    pub(super) fn fault(&self, fault: Fault) -> Error {
        Error::file(self.file.path(), fault)
    }

    pub(super) fn key(&self, role: Role) -> String {
        self.keys.get(&role).copied().unwrap_or_default().to_owned()
    }

    /// The fault of a role that is not there, under the name that its key would have.
    pub(super) fn missing(&self, role: Role) -> Error {
        let present = self.keys.values().next().copied().unwrap_or_default();
        let partners = self.keys.values().filter_map(|key| key::partner(key));
        let by_partner = partners.into_iter().find(|key| key::Key::parse(key).is_some_and(|key| key.role == role));
        let missing = by_partner.unwrap_or_else(|| format!("{}.{}", self.spelling, key::suffix_of(role)));
        self.fault(Fault::MissingPart { missing, present: present.to_owned() })
    }

    pub(super) fn misfit(&self, role: Role, array: &Array, other: Option<(Role, &Array)>, problem: &str) -> Error {
        self.fault(Fault::Misfit(Box::new(Misfit {
            key: self.key(role),
            shape: array.shape.clone(),
            other: other.map(|(role, array)| (self.key(role), array.shape.clone())),
            module: self.path.to_owned(),
            base: self.module.weight.clone(),
            problem: problem.to_owned(),
        })))
    }
}
