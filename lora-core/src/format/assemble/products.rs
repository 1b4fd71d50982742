//! LoHa, LoKr and GLoRA: products of more than two factors.

use super::{Assembled, Group, elements, flat};
use crate::{
    AnyAdapter, Array, Part, Result,
    adapter::{Direction, Dora, Glora, GloraOrder, KronFactor, Loha, Lokr},
    format::{Fault, PeftKind, Role},
};

impl Group<'_> {
    pub(super) fn loha(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let [out, inner] = self.sizes();
        let channels = self.module.weight.get(1).copied().unwrap_or(1);
        let rank = self.rank(Role::Factor(Part::HadaW1B), &self.need(Role::Factor(Part::HadaW1B))?)?;
        let half = |a: Part, b: Part, core: Part| -> Result<(Array, Array, Option<Array>)> {
            let (a_role, b_role, core_role) = (Role::Factor(a), Role::Factor(b), Role::Factor(core));
            let (left, right) = (flat(&self.need(a_role)?)?, flat(&self.need(b_role)?)?);
            let core = self.take(core_role)?;
            match &core {
                None => {
                    if left.shape != [out, right.shape[0]] {
                        return Err(self.misfit(a_role, &left, Some((b_role, &right)), "it does not fit"));
                    }
                    if right.shape[1] != inner {
                        let problem = "its input is not the module's";
                        return Err(self.misfit(b_role, &right, Some((a_role, &left)), problem));
                    }
                }
                Some(core) => {
                    let kernel = inner / channels.max(1);
                    let fits = matches!(core.shape[..], [p, q, kh, kw]
                        if p == left.shape[0] && q == right.shape[0] && kh * kw == kernel);
                    if !fits || left.shape[1] != out || right.shape[1] != channels {
                        return Err(self.misfit(core_role, core, Some((b_role, &right)), "the core does not fit"));
                    }
                }
            }
            Ok((left, right, core))
        };
        let (w1_a, w1_b, t1) = half(Part::HadaW1A, Part::HadaW1B, Part::HadaT1)?;
        let (w2_a, w2_b, t2) = half(Part::HadaW2A, Part::HadaW2B, Part::HadaT2)?;
        let loha = Loha { w1_a, w1_b, w2_a, w2_b, t1, t2, scale: self.scale(rank, result)? };
        match self.magnitude(false)? {
            None => Ok(AnyAdapter::Loha(loha)),
            Some((magnitude, axis, rule)) => {
                Ok(AnyAdapter::Dora(Dora { direction: Direction::Loha(loha), magnitude, axis, rule }))
            }
        }
    }

    pub(super) fn lokr(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let factor = |whole: Part, a: Part, b: Part, core: Part| -> Result<(KronFactor<Array>, [usize; 2])> {
            let [whole, a, b, core] = [whole, a, b, core].map(Role::Factor);
            if let Some(array) = self.take(whole)? {
                if self.has(a) || self.has(b) {
                    let other = if self.has(a) { a } else { b };
                    return Err(self.misfit(whole, &array, None, &format!("`{}` says it again", self.key(other))));
                }
                self.rank(whole, &array)?;
                let size = [array.shape[0], elements(&array) / array.shape[0].max(1)];
                return Ok((KronFactor::Whole(array), size));
            }
            if !self.has(a) && !self.has(b) {
                return Err(self.missing(whole));
            }
            let (left, right) = (flat(&self.need(a)?)?, flat(&self.need(b)?)?);
            self.rank(b, &right)?;
            if let Some(array) = self.take(core)? {
                let fits = matches!(array.shape[..], [p, q, _, _] if p == left.shape[0] && q == right.shape[0]);
                if !fits {
                    return Err(self.misfit(core, &array, Some((a, &left)), "the core does not fit"));
                }
                let size = [left.shape[1], right.shape[1] * array.shape[2] * array.shape[3]];
                return Ok((KronFactor::Tucker { core: array, a: left, b: right }, size));
            }
            if left.shape[1] != right.shape[0] {
                return Err(self.misfit(a, &left, Some((b, &right)), "the two halves have different ranks"));
            }
            let size = [left.shape[0], right.shape[1]];
            Ok((KronFactor::Product { a: left, b: right }, size))
        };
        // No program writes a core for the first factor; its role is never found in a file.
        let (w1, [o1, i1]) = factor(Part::KronW1, Part::KronW1A, Part::KronW1B, Part::KronT1)?;
        let (w2, [o2, i2]) = factor(Part::KronW2, Part::KronW2A, Part::KronW2B, Part::KronT2)?;
        let [out, inner] = self.sizes();
        if o1 * o2 != out || i1 * i2 != inner {
            let role = if self.has(Role::Factor(Part::KronW2)) { Part::KronW2 } else { Part::KronW2B };
            let role = Role::Factor(role);
            let problem = format!("the Kronecker product of the two factors is [{}, {}]", o1 * o2, i1 * i2);
            return Err(self.misfit(role, &self.need(role)?, None, &problem));
        }
        let product_rank = |factor: &KronFactor<Array>| match factor {
            KronFactor::Whole(_) => None,
            KronFactor::Product { b, .. } | KronFactor::Tucker { b, .. } => Some(b.shape[0]),
        };
        let scale =
            match (self.config.filter(|config| config.kind == PeftKind::Lokr), product_rank(&w2).or(product_rank(&w1)))
            {
                (Some(config), _) => config.scale(&self.names(), None) * self.scalar()?,
                (None, Some(rank)) => self.scale(rank, result)?,
                // Both factors whole: LyCORIS writes an alpha and does not mean it.
                (None, None) => {
                    self.alpha()?;
                    self.scalar()?
                }
            };
        let lokr = Lokr { w1, w2, scale };
        match self.magnitude(false)? {
            None => Ok(AnyAdapter::Lokr(lokr)),
            Some((magnitude, axis, rule)) => {
                Ok(AnyAdapter::Dora(Dora { direction: Direction::Lokr(lokr), magnitude, axis, rule }))
            }
        }
    }

    pub(super) fn glora(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let [a1, a2, b1, b2] = [Part::GloraA1, Part::GloraA2, Part::GloraB1, Part::GloraB2];
        let read = |part| self.need(Role::Factor(part));
        let (whole_a1, whole_a2, whole_b1, whole_b2) = (read(a1)?, read(a2)?, read(b1)?, read(b2)?);
        let (fa1, fa2) = (flat(&whole_a1)?, flat(&whole_a2)?);
        let (fb1, fb2) = (flat(&whole_b1)?, flat(&whole_b2)?);
        let [out, inner] = self.sizes();
        let channels = self.module.weight.get(1).copied().unwrap_or(1);
        let fits = |tall_a: &Array, wide_a: &Array, tall_b: &Array, wide_b: &Array| {
            tall_a.shape == [channels, wide_a.shape[0]]
                && wide_a.shape[1] == channels
                && tall_b.shape == [out, wide_b.shape[0]]
                && wide_b.shape[1] == inner
        };
        // Where both fit, the older: as ComfyUI reads them.
        let order = if fits(&fa2, &fa1, &fb2, &fb1) {
            GloraOrder::Older
        } else if fits(&fa1, &fa2, &fb1, &fb2) {
            GloraOrder::Current
        } else {
            let (a1, b1) = (Role::Factor(a1), Role::Factor(b1));
            return Err(self.misfit(a1, &fa1, Some((b1, &fb1)), "the factors fit in neither order"));
        };
        let rank = if order == GloraOrder::Current { fa2.shape[0] } else { fa1.shape[0] };
        if rank == 0 {
            return Err(self.fault(Fault::RankZero { key: self.key(Role::Factor(a2)), shape: fa2.shape }));
        }
        self.refuse_magnitude("GLoRA")?;
        let scale = self.scale(rank, result)?;
        Ok(AnyAdapter::Glora(Glora { a1: whole_a1, a2: whole_a2, b1: whole_b1, b2: whole_b2, order, scale }))
    }
}
