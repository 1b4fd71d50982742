//! The adapters in training: which projection each sits on, and which of its tensors are pieces of the arena.

use lora_core::{Adapter, AnyAdapter, Draw, Purpose, adapter::Part, format::Component};
use tch::{Kind, Tensor};

use super::TrainOptions;
use crate::{Error, Model, Projection, Result, Torch, arena::Arena};

/// What a target module gets.
#[derive(Debug)]
pub struct Target {
    /// Factor on the learning rate, for example for a text encoder.
    pub rate: f64,
    /// An adapter to go on from; `None` starts a fresh one.
    pub start: Option<AnyAdapter<Tensor>>,
}

impl Default for Target {
    fn default() -> Self {
        Self { rate: 1.0, start: None }
    }
}

/// An adapter with the module that it belongs to.
#[derive(Debug)]
pub struct NamedAdapter {
    /// The component, if its weights say so.
    pub component: Option<Component>,
    /// The module's path in the checkpoint.
    pub path: String,
    /// Its tensors, 32-bit, cut off from gradients.
    pub adapter: AnyAdapter<Tensor>,
}

/// All adapters in training.
#[derive(Debug)]
pub(super) struct Trained {
    modules: Vec<Module>,
    /// Learning-rate factor of each group of the arena.
    pub(super) factors: Vec<f64>,
}

#[derive(Debug)]
struct Module {
    /// Its index among the model's projections.
    place: usize,
    component: Option<Component>,
    path: String,
    /// Kind of the base weight, in which the forward pass wants its factors.
    kind: Kind,
    template: AnyAdapter<Slot>,
}

/// Where a tensor of an adapter comes from.
#[derive(Debug)]
enum Slot {
    /// The index of a piece of the arena.
    Piece(usize),
    /// A frozen tensor, 32-bit and in the kind of the forward pass.
    Frozen { master: Tensor, working: Tensor },
}

impl Slot {
    fn share(&self) -> Self {
        match self {
            Self::Piece(index) => Self::Piece(*index),
            Self::Frozen { master, working } => {
                Self::Frozen { master: master.shallow_clone(), working: working.shallow_clone() }
            }
        }
    }
}

impl Trained {
    /// Starts or takes over an adapter for every projection that `select` gives a target.
    pub(super) fn new(
        on: &Torch,
        model: &mut dyn Model,
        select: &mut dyn FnMut(&Projection) -> Option<Target>,
        TrainOptions { adapter: config, seed, up_rate, .. }: &TrainOptions,
    ) -> Result<(Self, Arena)> {
        let _no_grad = tch::no_grad_guard();
        let master = on.with_kind(Kind::Float);
        let (mut modules, mut pieces, mut factors) = (Vec::new(), Vec::new(), Vec::<f64>::new());
        for (place, projection) in model.projections().into_iter().enumerate() {
            let Some(Target { rate, start }) = select(projection) else { continue };
            let adapter = match start {
                Some(adapter) => adapter,
                None => {
                    // The draw depends on the module's place alone, so that other targets leave it as it was.
                    let mut draw = Draw::new(*seed, Purpose::Init, 0, place as u32);
                    AnyAdapter::init(&master, &projection.weight_in(Kind::Float)?, config, &mut draw)?
                }
            };
            let kind = projection.backend().kind;
            let template = adapter.map(&mut |part, tensor| {
                let settle = || {
                    let tensor = tensor.f_detach()?.f_to_device(on.device)?.f_to_kind(Kind::Float)?;
                    let working = tensor.f_to_kind(kind)?;
                    Ok::<_, Error>((tensor, working))
                };
                let (tensor, working) = settle().map_err(core)?;
                if part.is_frozen() {
                    return Ok(Slot::Frozen { master: tensor, working });
                }
                let rate = if part == Part::Up { rate * up_rate } else { rate };
                let group = factors.iter().position(|factor| *factor == rate).unwrap_or_else(|| {
                    factors.push(rate);
                    factors.len() - 1
                });
                pieces.push((tensor, group));
                Ok(Slot::Piece(pieces.len() - 1))
            })?;
            let (component, path) = (projection.component(), projection.path().to_owned());
            modules.push(Module { place, component, path, kind, template });
        }
        let pieces: Vec<(&Tensor, usize)> = pieces.iter().map(|(tensor, group)| (tensor, *group)).collect();
        let arena = Arena::new(on.device, &pieces)?;
        Ok((Self { modules, factors }, arena))
    }

    /// Puts views of the arena on the model, differentiable if grad mode is on.
    pub(super) fn attach(&self, model: &mut dyn Model, arena: &Arena) -> Result<()> {
        let kind = self.kind();
        self.put(model, kind, &arena.views(kind)?)
    }

    /// Puts other values, laid out as the arena, on the model.
    pub(super) fn attach_values(&self, model: &mut dyn Model, arena: &Arena, flat: &Tensor) -> Result<()> {
        let kind = self.kind();
        self.put(model, kind, &arena.split(&flat.f_to_kind(kind)?)?)
    }

    /// The kind that the flat values are cast to as a whole.
    pub(super) fn kind(&self) -> Kind {
        self.modules.first().map_or(Kind::Float, |module| module.kind)
    }

    fn put(&self, model: &mut dyn Model, kind: Kind, views: &[Tensor]) -> Result<()> {
        let mut projections = model.projections();
        for module in &self.modules {
            let Some(projection) = projections.get_mut(module.place) else {
                let reason = format!("the model no longer has `{}`", module.path);
                return Err(Error::Config { option: "targets", reason });
            };
            let adapter = module.template.map(&mut |_, slot| match slot {
                Slot::Piece(index) if module.kind == kind => Ok(views[*index].shallow_clone()),
                // A component in another kind than the rest pays a cast of its own.
                Slot::Piece(index) => views[*index].f_to_kind(module.kind).map_err(|error| core(error.into())),
                Slot::Frozen { working, .. } => Ok(working.shallow_clone()),
            })?;
            projection.set_trained(Some(adapter));
        }
        Ok(())
    }

    /// Takes the adapters off the model.
    pub(super) fn detach(&self, model: &mut dyn Model) {
        let mut projections = model.projections();
        for module in &self.modules {
            if let Some(projection) = projections.get_mut(module.place) {
                projection.set_trained(None);
            }
        }
    }

    /// The adapters with the values of `flat`, which is laid out as the arena; views of it.
    pub(super) fn adapters(&self, arena: &Arena, flat: &Tensor) -> Result<Vec<NamedAdapter>> {
        let views = arena.split(flat)?;
        let named = |module: &Module| {
            let adapter = module.template.map(&mut |_, slot| {
                Ok(match slot {
                    Slot::Piece(index) => views[*index].shallow_clone(),
                    Slot::Frozen { master, .. } => master.shallow_clone(),
                })
            })?;
            Ok(NamedAdapter { component: module.component, path: module.path.clone(), adapter })
        };
        self.modules.iter().map(named).collect()
    }

    /// Every frozen tensor with a name: first in 32 bits, then as the forward pass has it.
    pub(super) fn frozen(&self) -> Result<Vec<(String, [Tensor; 2])>> {
        let mut frozen = Vec::new();
        for (index, module) in self.modules.iter().enumerate() {
            module.template.map(&mut |part, slot| {
                if let Slot::Frozen { master, working } = slot {
                    let handles = [master.shallow_clone(), working.shallow_clone()];
                    frozen.push((format!("frozen.{index}.{part:?}"), handles));
                }
                Ok(())
            })?;
        }
        Ok(frozen)
    }

    /// One line a trained tensor, in the order of the arena's pieces: what a checkpoint must agree with.
    pub(super) fn layout(&self, arena: &Arena) -> Result<Vec<String>> {
        let mut lines = vec![String::new(); arena.pieces().len()];
        for module in &self.modules {
            let component = module.component.map(|component| format!("{component}.")).unwrap_or_default();
            module.template.map(&mut |part, slot| {
                if let Slot::Piece(index) = slot {
                    let piece = &arena.pieces()[*index];
                    lines[*index] =
                        format!("{component}{}.{part:?} {:?} at {}", module.path, piece.stored_shape(), piece.offset);
                }
                Ok(())
            })?;
        }
        Ok(lines)
    }

    /// The same adapters for another copy of the model: frozen tensors are shared.
    pub(super) fn share(&self) -> Result<Self> {
        let share = |module: &Module| {
            let template = module.template.map(&mut |_, slot| Ok(slot.share()))?;
            let Module { place, component, kind, ref path, .. } = *module;
            Ok(Module { place, component, path: path.clone(), kind, template })
        };
        Ok(Self { modules: self.modules.iter().map(share).collect::<Result<_>>()?, factors: self.factors.clone() })
    }

    /// The number of modules that carry an adapter.
    pub(super) fn count(&self) -> usize {
        self.modules.len()
    }
}

fn core(error: Error) -> lora_core::Error {
    match error {
        Error::Core(error) => error,
        other => lora_core::Error::Backend { operation: "adapter", source: Box::new(other) },
    }
}
