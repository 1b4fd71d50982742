//! Merging into files: a base is rewritten tensor by tensor, and never in memory as a whole.
//!
//! The output has the base's own layout: the same files, the same keys in the same order, the same metadata. What no adapter
//! changes is copied bit for bit; what changes is widened to `f32`, changed in the order of the adapters and rounded once.
//! Plain LoRA goes through tiles, every other family through [`merge`](super::merge) of the one tensor.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{
    AdaptedModule, AdapterStream, BaseModel, Component, Dtype, Fault, Replacement, Strengths, TensorFile, TensorLayout,
    atomic,
    blocks::{Blocks, write_blocks},
    checkpoint::{Source, Transform},
    header::count,
    merge::merge_parts,
    merge_config::ConfigChanges,
    names::Place,
    tiles::{Sink, Tensor, Update},
    touches::Touches,
    write,
};
use crate::{AnyAdapter, Array, Error, Result, adapter::Lora};

/// Bytes of output after which the memory that reading took is let go of: each time costs a walk through all of it.
const RELEASE: u64 = 64 << 20;

/// Adapters on their way into the files of a base.
#[derive(Debug)]
pub struct Merger<'a> {
    base: &'a BaseModel,
    adapters: &'a [(AdapterStream, Strengths)],
    /// Per file of the base: what becomes of each of its tensors, in the order of the output.
    files: Vec<Vec<Entry>>,
    /// How many tensors went through adapters and came out as they were.
    same: AtomicUsize,
    config: ConfigChanges,
}

#[derive(Debug)]
struct Entry {
    layout: TensorLayout,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// The bytes as they are, at this place of the file.
    Copy(Range<u64>),
    /// The same numbers in another type.
    Convert,
    /// Some of its rows, or all of it, change.
    Merge(Vec<Target>),
    /// The base has no such tensor: a bias that an adapter brings.
    New(Target),
    /// A head that was the embedding table gets a weight of its own, which begins as the table.
    Untie(Target),
}

/// A tensor of a component and where it lies in the file.
#[derive(Debug, Clone)]
struct Target {
    component: Component,
    name: String,
    source: Source,
}

impl Target {
    fn place(&self) -> Place {
        (self.component, self.name.rsplit_once('.').map_or(&*self.name, |(path, _)| path).to_owned())
    }
}

/// A tensor that the base lacks: how it is made, its key, its shape.
type Brought = (Work, String, Vec<usize>);

/// The adapters and whole tensors of one module, from one file.
type Parts = (Vec<AdaptedModule>, Vec<Replacement>);

impl<'a> Merger<'a> {
    /// Plans a merge: which tensors change, and how all of them will be stored.
    ///
    /// `dtype` is how numbers with a fraction are stored, `None` as the base has each.
    ///
    /// # Errors
    /// If an adapter changes a tensor that holds no such numbers, or leaves a table and a head of different length.
    pub fn new(base: &'a BaseModel, adapters: &'a [(AdapterStream, Strengths)], dtype: Option<Dtype>) -> Result<Self> {
        let touches = Touches::of(base, adapters);
        let config = touches.config_changes(dtype)?;
        // What changes, by file and key.
        let mut changes: Vec<BTreeMap<String, Vec<Target>>> = base.files().iter().map(|_| BTreeMap::new()).collect();
        let mut brought: Vec<Vec<(Brought, Dtype)>> = base.files().iter().map(|_| Vec::new()).collect();
        for (component, name) in touches.names() {
            let index = |file: &TensorFile| base.files().iter().position(|other| std::ptr::eq(other, file));
            let target = |source: Source| Target { component: *component, name: name.clone(), source };
            base.check_whole(*component, name)?;
            if let Some((file, source)) = base.locate(*component, name) {
                if let Some(index) = index(file) {
                    changes[index].entry(source.key.clone()).or_default().push(target(source.clone()));
                }
                continue;
            }
            // What can be missing is a head that is the embedding table, and a bias: each comes to lie where the numbers
            // lie that it begins with, or the weight that it belongs to.
            let weight = name.strip_suffix("bias").map(|stem| format!("{stem}weight"));
            let named = weight.as_deref().unwrap_or(name);
            let Some((file, source)) = base.origin(*component, named) else { continue };
            let Some(index) = index(file) else { continue };
            let stored = file.info(&source.key).map_or(Dtype::F32, |info| info.dtype);
            let shape = touches.new_shape(*component, named).unwrap_or(&source.shape);
            let stem = source.key.strip_suffix("weight").filter(|_| base.locate(*component, named).is_some());
            let new = match (&weight, stem) {
                (None, _) => (Work::Untie(target(source.clone())), name.clone(), shape.to_vec()),
                (Some(_), stem) => {
                    let key = stem.map_or(name.clone(), |stem| format!("{stem}bias"));
                    let shape = vec![shape.first().copied().unwrap_or(0)];
                    (Work::New(target(Source::plain(&key, &shape))), key, shape)
                }
            };
            brought[index].push((new, stored));
        }
        let mut files = Vec::new();
        for ((file, mut changes), brought) in base.files().iter().zip(changes).zip(brought) {
            let wanted = |stored: Dtype| dtype.filter(|_| stored.is_float()).unwrap_or(stored);
            let mut entries = Vec::new();
            for key in file.names_in_place() {
                let Some(info) = file.info(key) else { continue };
                let mut layout =
                    TensorLayout { name: key.to_owned(), dtype: wanted(info.dtype), shape: info.shape.clone() };
                let work = match changes.remove(key) {
                    Some(targets) => {
                        if !info.dtype.is_float() {
                            let fault = Fault::NotNumbers { tensor: key.to_owned(), dtype: info.dtype };
                            return Err(Error::file(file.path(), fault));
                        }
                        let replaced = |target: &Target| {
                            let whole = target.source.rows.is_none() && target.source.transform == Transform::Keep;
                            touches.new_shape(target.component, &target.name).filter(|_| whole)
                        };
                        if let Some(shape) = targets.iter().find_map(replaced) {
                            layout.shape = shape.to_vec();
                        }
                        Work::Merge(targets)
                    }
                    None if layout.dtype == info.dtype => Work::Copy(info.range.start as u64..info.range.end as u64),
                    None => Work::Convert,
                };
                entries.push(Entry { layout, work });
            }
            for ((work, name, shape), stored) in brought {
                entries.push(Entry { layout: TensorLayout { name, dtype: wanted(stored), shape }, work });
            }
            files.push(entries);
        }
        Ok(Self { base, adapters, files, config, same: AtomicUsize::new(0) })
    }

    /// What `config.json` says of the base that is not true of the result.
    pub(super) fn config_changes(&self) -> ConfigChanges {
        self.config
    }

    /// How many stored tensors an adapter acts on.
    pub fn acted_on(&self) -> usize {
        let entries = self.files.iter().flatten();
        entries.filter(|entry| !matches!(entry.work, Work::Copy(_) | Work::Convert)).count()
    }

    /// How many of those that were written are other numbers now; an update of zeros, or one too small for the type in
    /// which the base is stored, changes nothing.
    pub fn changed(&self) -> usize {
        self.acted_on() - self.same.load(Ordering::Relaxed)
    }

    /// Whether anything changes in a file of [`BaseModel::files`], be it the type alone.
    pub fn changes_file(&self, index: usize) -> bool {
        self.files.get(index).is_some_and(|entries| entries.iter().any(|entry| !matches!(entry.work, Work::Copy(_))))
    }

    /// The base.
    pub fn base(&self) -> &'a BaseModel {
        self.base
    }

    /// How many tensors are stored in all.
    pub fn tensors(&self) -> usize {
        self.files.iter().map(Vec::len).sum()
    }

    /// Bytes of all tensors of the output.
    pub fn bytes(&self) -> u64 {
        (0..self.files.len()).map(|index| self.bytes_of(index)).sum()
    }

    /// Bytes of the tensors of one file.
    pub(super) fn bytes_of(&self, index: usize) -> u64 {
        let entries = self.files.get(index).into_iter().flatten();
        entries.filter_map(|entry| entry.layout.dtype.bytes_of(&entry.layout.shape)).sum::<usize>() as u64
    }

    /// The tensors of one file that the base lacks.
    pub(super) fn new_tensors(&self, index: usize) -> impl Iterator<Item = &str> {
        let entries = self.files.get(index).into_iter().flatten();
        entries.filter(|entry| matches!(entry.work, Work::New(_) | Work::Untie(_))).map(|entry| &*entry.layout.name)
    }

    /// Writes the file that takes the place of the `index`th of [`BaseModel::files`]; see
    /// [`write_atomically`](super::write_atomically) for what stands at `path` afterwards.
    ///
    /// `progress` is told after every tensor how many bytes of this file are written.
    ///
    /// # Errors
    /// If a result is not finite in its type (the tensor is named), or the file cannot be written.
    pub fn write(&self, index: usize, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let (Some(file), Some(entries)) = (self.base.files().get(index), self.files.get(index)) else {
            return Err(Error::file(path, Fault::Absent { tensor: String::new() }));
        };
        let metadata = metadata(file);
        let layout: Vec<TensorLayout> = entries.iter().map(|entry| entry.layout.clone()).collect();
        let order: Vec<usize> = (0..layout.len()).collect();
        let header = write::header_in_order(path, &layout, &order, &metadata)?;
        let fill = |blocks: &mut Blocks| {
            let mut sink = Sink::new(blocks, path);
            sink.bytes(&header)?;
            self.write_tensors(file, entries, &mut sink, progress)
        };
        atomic::replace_file(
            path,
            |out| write_blocks(out, path, header.len() as u64 + self.bytes_of(index), fill),
            |written| write::verify(path, written, &layout, &metadata).map(drop),
        )
    }

    fn write_tensors(
        &self,
        file: &TensorFile,
        entries: &[Entry],
        sink: &mut Sink<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        // Neighbours that stay as they are go together.
        let mut run: Option<Range<u64>> = None;
        let mut released = 0;
        for entry in entries {
            if let Work::Copy(range) = &entry.work {
                match &mut run {
                    Some(run) if run.end == range.start => run.end = range.end,
                    _ => {
                        self.copy(file, run.replace(range.clone()), sink)?;
                        progress(sink.written());
                    }
                }
                continue;
            }
            self.copy(file, run.take(), sink)?;
            if !self.tensor(file, entry, sink)? && matches!(entry.work, Work::Merge(_) | Work::New(_)) {
                self.same.fetch_add(1, Ordering::Relaxed);
            }
            if sink.written() - released >= RELEASE {
                self.release();
                released = sink.written();
            }
            progress(sink.written());
        }
        self.copy(file, run, sink)?;
        progress(sink.written());
        Ok(())
    }

    fn copy(&self, file: &TensorFile, range: Option<Range<u64>>, sink: &mut Sink<'_>) -> Result<()> {
        match (range, file.handle()) {
            (Some(range), Some(handle)) => sink.range(handle, range),
            // A file without a map is empty.
            _ => Ok(()),
        }
    }

    /// Writes a tensor; gives whether its numbers are others than before.
    fn tensor(&self, file: &TensorFile, entry: &Entry, sink: &mut Sink<'_>) -> Result<bool> {
        let name = &*entry.layout.name;
        let to = entry.layout.dtype;
        let targets = match &entry.work {
            Work::Copy(_) => return Ok(false),
            Work::Convert => &[][..],
            Work::Merge(targets) => targets,
            Work::Untie(target) => std::slice::from_ref(target),
            Work::New(target) => {
                let parts = self.parts(target)?;
                let array = self.merged(target, &parts)?;
                return sink.numbers(name, array.as_ref().map_or(&[], |array| &array.values), to, &[]);
            }
        };
        let from = if let Work::Untie(table) = &entry.work { &*table.source.key } else { name };
        let absent = || Error::file(file.path(), Fault::Absent { tensor: from.to_owned() });
        let (info, bytes) = file.info(from).zip(file.bytes(from)).ok_or_else(absent)?;
        let parts: Vec<_> = targets.iter().map(|target| self.parts(target)).collect::<Result<_>>()?;
        let updates: Option<Vec<Vec<Update>>> =
            targets.iter().zip(&parts).map(|(target, parts)| self.updates(target, parts)).collect();
        if let Some(updates) = updates {
            drop(parts);
            let updates: Vec<Update> = updates.into_iter().flatten().collect();
            let columns = if updates.is_empty() { 1 } else { count(info.shape.get(1..).unwrap_or_default()) };
            let tensor = Tensor { name, bytes, from: info.dtype, to, columns, updates: &updates };
            return sink.tensor(&tensor, &|| file.release());
        }
        let mut stored = file.array(from)?;
        for (target, parts) in targets.iter().zip(&parts) {
            let Some(array) = self.merged(target, parts)? else { continue };
            match target.source.rows.is_none() && target.source.transform == Transform::Keep {
                // A table may have grown.
                true => stored = array,
                false => target.source.put_back(&array, &mut stored)?,
            }
        }
        sink.numbers(name, &stored.values, to, if info.dtype == to { bytes } else { &[] })
    }

    /// What each adapter file has for the module of a tensor.
    fn parts(&self, target: &Target) -> Result<Vec<Parts>> {
        let place = target.place();
        self.adapters.iter().map(|(stream, _)| stream.module(self.base, &place)).collect()
    }

    /// A tensor after all adapters; `None` if they leave it alone.
    fn merged(&self, target: &Target, parts: &[Parts]) -> Result<Option<Array>> {
        let acting: Vec<_> = parts
            .iter()
            .zip(self.adapters)
            .map(|((modules, replacements), (_, strengths))| (&**modules, &**replacements, strengths))
            .collect();
        let mut changed = merge_parts(&mut |component, name| self.base.read(component, name), &acting)?;
        Ok(changed.remove(&(target.component, target.name.clone())))
    }

    /// The low-rank products that make up all that happens to a tensor; `None` if something else happens.
    fn updates(&self, target: &Target, parts: &[Parts]) -> Option<Vec<Update>> {
        let source = &target.source;
        if source.transform == Transform::Transpose || !target.name.ends_with(".weight") {
            return None;
        }
        let out = *source.shape.first()?;
        let columns = count(source.shape.get(1..).unwrap_or_default());
        let rows = source.rows.clone().unwrap_or(0..out);
        let mut updates = Vec::new();
        for ((modules, replacements), (_, strengths)) in parts.iter().zip(self.adapters) {
            if !replacements.is_empty() {
                return None;
            }
            for module in modules {
                let AnyAdapter::Lora(Lora { down, up, mid: None, start: None, scale, .. }) = &module.adapter else {
                    return None;
                };
                let rank = *down.shape.first()?;
                let factor = (strengths.of(module.component, &module.path) * scale) as f32;
                if up.values.len() != out * rank || down.values.len() != rank * columns || rows.len() != out {
                    return None;
                }
                if factor != 0.0 {
                    let (up, down) = (up.values.clone(), down.values.clone());
                    updates.push(Update { rows: rows.clone(), factor, rank, up, down });
                }
            }
        }
        Some(updates)
    }

    fn release(&self) {
        self.adapters.iter().for_each(|(stream, _)| stream.release(self.base));
    }

    /// The components that an adapter changes.
    pub fn components(&self) -> BTreeSet<Component> {
        let targets = self.files.iter().flatten().flat_map(|entry| match &entry.work {
            Work::Merge(targets) => targets.iter().map(|target| target.component).collect::<Vec<_>>(),
            Work::New(target) | Work::Untie(target) => vec![target.component],
            Work::Copy(_) | Work::Convert => Vec::new(),
        });
        targets.collect()
    }
}

/// What the base says about itself, less the hash of numbers that are no longer these.
fn metadata(file: &TensorFile) -> BTreeMap<String, String> {
    let mut metadata = file.metadata().clone();
    metadata.remove("modelspec.hash_sha256");
    metadata
}
