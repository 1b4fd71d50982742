//! Generated adapters of every family, with ranks, alphas and number types mixed in one file, through every pair of dialects
//! that can hold them: what comes back is what was written, bit for bit.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::LazyLock,
};

use lora_core::{
    AnyAdapter, Array,
    adapter::{
        Axis, Boft, Cayley, Direction, Dora, Full, Glora, GloraOrder, Ia3, Ia3Kind, KronFactor, Loha, Lokr, Lora, Oft,
        OftSide, StrengthRule,
    },
    format::{
        AdaptedModule, AdapterFile, BaseModel, Component, Dialect, Dtype, Family, TensorFile, write_adapter,
        write_adapter_file,
    },
};
use proptest::prelude::*;

// --- what is generated

/// The families that files can hold, with the variants that are written differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lora,
    Tucker,
    DoraOut,
    DoraIn,
    DoraLoha,
    DoraLokr,
    Loha,
    LohaTucker,
    LokrWhole,
    LokrProduct,
    LokrBoth,
    LokrTucker,
    Glora,
    Full,
    FullWithBias,
    BiasAlone,
    Ia3,
    Oft,
    Boft,
}

const LYCORIS: &[Kind] = &[
    Kind::Lora,
    Kind::Tucker,
    Kind::DoraOut,
    Kind::DoraIn,
    Kind::DoraLoha,
    Kind::DoraLokr,
    Kind::Loha,
    Kind::LohaTucker,
    Kind::LokrWhole,
    Kind::LokrProduct,
    Kind::LokrBoth,
    Kind::LokrTucker,
    Kind::Glora,
    Kind::Full,
    Kind::FullWithBias,
    Kind::BiasAlone,
    Kind::Ia3,
    Kind::Oft,
    Kind::Boft,
];

/// Numbers without a pattern: proptest gives the seed, so that what it reports is small.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Between −2 and 2, never 0.
    fn number(&mut self) -> f32 {
        let number = (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0;
        if number == 0.0 { 0.25 } else { number }
    }

    /// Numbers that the type holds exactly.
    fn array(&mut self, shape: &[usize], dtype: Dtype) -> Array {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.number()).collect();
        Array::new(shape, dtype.widen(&dtype.narrow(&values).unwrap()).unwrap()).unwrap()
    }
}

/// An adapter of a family on a weight; `None` where the family does not fit it.
fn adapter(kind: Kind, weight: &[usize], bias: bool, dtype: Dtype, random: &mut Random) -> Option<AnyAdapter<Array>> {
    let out = weight[0];
    if weight.len() == 1 {
        let full = |diff, diff_bias| Some(AnyAdapter::Full(Full { diff, diff_bias }));
        let diff_bias = bias.then(|| random.array(&[out], dtype));
        return match kind {
            Kind::Full => full(Some(random.array(weight, dtype)), None),
            Kind::FullWithBias => full(Some(random.array(weight, dtype)), Some(diff_bias?)),
            Kind::BiasAlone => full(None, Some(diff_bias?)),
            _ => None,
        };
    }
    let (channels, inner) = (weight[1], weight[1..].iter().product::<usize>());
    let kernel = &weight[2..];
    let has_kernel = kernel.iter().product::<usize>() > 1;
    let rank = 1 + random.below(4);
    // As programs write them, with a few decimals, or any number at all; a file keeps alphas as `f32`.
    let alpha = match random.below(3) {
        0 => (1 + random.below(64)) as f32,
        1 => random.below(1000) as f32 / 100.0,
        _ => random.number(),
    };
    let scale = f64::from(alpha) / rank as f64;
    let mut down = weight.to_vec();
    down[0] = rank;
    let mut up = vec![1; weight.len()];
    (up[0], up[1]) = (out, rank);
    let lora = |random: &mut Random| Lora::new(random.array(&down, dtype), random.array(&up, dtype), scale);
    let loha = |random: &mut Random| Loha {
        w1_a: random.array(&[out, rank], dtype),
        w1_b: random.array(&[rank, inner], dtype),
        w2_a: random.array(&[out, rank], dtype),
        w2_b: random.array(&[rank, inner], dtype),
        t1: None,
        t2: None,
        scale,
    };
    let square = |rank: usize| [&[rank, rank], kernel].concat();
    let lokr = |random: &mut Random, kind: Kind| {
        let (o1, i1) = if out.is_multiple_of(2) && channels.is_multiple_of(2) { (2, 2) } else { (1, 1) };
        let (o2, i2) = (out / o1, channels / i1);
        let product = |random: &mut Random, o, i| KronFactor::Product {
            a: random.array(&[o, rank], dtype),
            b: random.array(&[rank, i], dtype),
        };
        let whole = |random: &mut Random, shape: &[usize]| KronFactor::Whole(random.array(shape, dtype));
        let w1 = match kind {
            Kind::LokrBoth => product(random, o1, i1),
            _ => whole(random, &[o1, i1]),
        };
        let w2 = match kind {
            Kind::LokrWhole => whole(random, &[&[o2, i2], kernel].concat()),
            Kind::LokrTucker => KronFactor::Tucker {
                core: random.array(&square(rank), dtype),
                a: random.array(&[rank, o2], dtype),
                b: random.array(&[rank, i2], dtype),
            },
            _ => product(random, o2, inner / i1),
        };
        Lokr { w1, w2, scale: if kind == Kind::LokrWhole { 1.0 } else { scale } }
    };
    let dora = |direction, axis, random: &mut Random| {
        let length = if axis == Axis::Output { out } else { channels };
        let magnitude = random.array(&[length], dtype);
        AnyAdapter::Dora(Dora { direction, magnitude, axis, rule: StrengthRule::Interpolate })
    };
    // A magnitude says its axis by its shape, so the two must differ.
    let both_axes = out > 1 && channels > 1;
    let size = [4, 3, 2].into_iter().find(|size| out.is_multiple_of(*size));
    Some(match kind {
        Kind::Lora => AnyAdapter::Lora(lora(random)),
        Kind::Tucker if has_kernel => {
            let mut lora = lora(random);
            lora.down = random.array(&[rank, channels, 1, 1], dtype);
            lora.mid = Some(random.array(&square(rank), dtype));
            AnyAdapter::Lora(lora)
        }
        Kind::DoraOut if both_axes => dora(Direction::Lora(lora(random)), Axis::Output, random),
        Kind::DoraIn if both_axes => dora(Direction::Lora(lora(random)), Axis::Input, random),
        Kind::DoraLoha if both_axes => dora(Direction::Loha(loha(random)), Axis::Output, random),
        Kind::DoraLokr if both_axes => dora(Direction::Lokr(lokr(random, Kind::LokrProduct)), Axis::Input, random),
        Kind::Loha => AnyAdapter::Loha(loha(random)),
        Kind::LohaTucker if has_kernel => AnyAdapter::Loha(Loha {
            w1_a: random.array(&[rank, out], dtype),
            w1_b: random.array(&[rank, channels], dtype),
            w2_a: random.array(&[rank, out], dtype),
            w2_b: random.array(&[rank, channels], dtype),
            t1: Some(random.array(&square(rank), dtype)),
            t2: Some(random.array(&square(rank), dtype)),
            scale,
        }),
        Kind::LokrWhole | Kind::LokrProduct | Kind::LokrBoth => AnyAdapter::Lokr(lokr(random, kind)),
        Kind::LokrTucker if has_kernel => AnyAdapter::Lokr(lokr(random, kind)),
        // Of a rank other than the width, since the older order wins where both fit.
        Kind::Glora if rank != channels && rank != out => AnyAdapter::Glora(Glora {
            a1: random.array(&[channels, rank], dtype),
            a2: random.array(&[rank, channels], dtype),
            b1: random.array(&[out, rank], dtype),
            b2: random.array(&[rank, inner], dtype),
            order: GloraOrder::Current,
            scale,
        }),
        Kind::Full => AnyAdapter::Full(Full { diff: Some(random.array(weight, dtype)), diff_bias: None }),
        Kind::FullWithBias if bias => AnyAdapter::Full(Full {
            diff: Some(random.array(weight, dtype)),
            diff_bias: Some(random.array(&[out], dtype)),
        }),
        Kind::BiasAlone if bias => AnyAdapter::Full(Full { diff: None, diff_bias: Some(random.array(&[out], dtype)) }),
        Kind::Ia3 => {
            let axis = random.pick(&[Axis::Output, Axis::Input]);
            let mut shape = vec![1; weight.len()];
            let index = usize::from(axis == Axis::Input);
            shape[index] = weight[index];
            let shape = if axis == Axis::Output && weight.len() == 2 { vec![out] } else { shape };
            AnyAdapter::Ia3(Ia3 { vector: random.array(&shape, dtype), axis, kind: Ia3Kind::Offset })
        }
        Kind::Oft => {
            let size = size?;
            let bound = random.pick(&[None, Some(f64::from(alpha.abs() + 0.125) * out as f64)]);
            let rescale = random.pick(&[true, false]).then(|| random.array(&[out, 1], dtype));
            let blocks = random.array(&[out / size, size, size], dtype);
            AnyAdapter::Oft(Oft { blocks, rescale, side: OftSide::Rows { bound } })
        }
        Kind::Boft if out.is_multiple_of(4) => AnyAdapter::Boft(Boft {
            blocks: random.array(&[2, out / 2, 2, 2], dtype),
            rescale: None,
            bound: random.pick(&[None, Some(f64::from(alpha.abs() + 0.125) * out as f64)]),
        }),
        _ => return None,
    })
}

static SD15: LazyLock<BaseModel> = LazyLock::new(|| base("sd15"));
static SD21: LazyLock<BaseModel> = LazyLock::new(|| base("sd21"));
static SDXL: LazyLock<BaseModel> = LazyLock::new(|| base("sdxl"));
static LLAMA: LazyLock<BaseModel> = LazyLock::new(|| base("llama"));

fn base(name: &str) -> BaseModel {
    BaseModel::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/bases").join(name)).unwrap()
}

fn diffusion_base(index: usize) -> &'static BaseModel {
    [&SD15, &SD21, &SDXL][index]
}

/// One adapter a module, on modules of all components; those that a family does not fit are left out.
fn modules(base: &BaseModel, components: &[Component], kinds: &[Kind], count: usize, seed: u64) -> Vec<AdaptedModule> {
    let mut random = Random(seed);
    let all: Vec<(Component, String, Vec<usize>, bool)> = components
        .iter()
        .flat_map(|component| {
            base.modules(*component)
                .filter(|(path, module)| !module.weight.is_empty() && !path.contains("embedding"))
                .map(|(path, module)| (*component, path.to_owned(), module.weight.clone(), module.bias))
        })
        .collect();
    let mut taken = BTreeSet::new();
    let mut modules = Vec::new();
    for _ in 0..count {
        let index = random.below(all.len());
        let (component, path, weight, bias) = &all[index];
        let dtype = random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]);
        let kind = random.pick(kinds);
        if !taken.insert(index) {
            continue;
        }
        let Some(adapter) = adapter(kind, weight, *bias, dtype, &mut random) else { continue };
        let (component, path, weight) = (*component, path.clone(), weight.clone());
        modules.push(AdaptedModule { component, path, adapter, weight, dtype, turned: false });
    }
    // As they are read: patterns of a configuration have this order.
    modules.sort_by(|a, b| (a.component, &a.path).cmp(&(b.component, &b.path)));
    modules
}

fn metadata() -> impl Strategy<Value = BTreeMap<String, String>> {
    let key = prop_oneof![
        prop::sample::select(vec!["ss_seed", "ss_tag_frequency", "modelspec.title", "lora.note", "author"])
            .prop_map(str::to_owned),
        "[a-z_.é ]{1,12}",
    ];
    prop::collection::btree_map(key, "\\PC{0,20}|[\\x00-\\x1f\"\\\\]{0,4}", 0..6)
}

// --- how it goes through

/// All that a file says: metadata; names with type, shape and bytes; and peft's configuration beside it.
#[derive(Debug, PartialEq)]
struct Content {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    config: Option<serde_json::Value>,
}

impl Content {
    fn of(path: &Path) -> Self {
        let inside = |name: &str| if path.is_dir() { path.join(name) } else { path.to_owned() };
        let file = TensorFile::open(&inside("adapter_model.safetensors")).unwrap();
        let tensor = |name: &str| {
            let info = file.info(name).unwrap();
            (name.to_owned(), (info.dtype, info.shape.clone(), file.bytes(name).unwrap().to_vec()))
        };
        let config = path.is_dir().then(|| std::fs::read(path.join("adapter_config.json")).unwrap());
        Self {
            metadata: file.metadata().clone(),
            tensors: file.names().map(tensor).collect(),
            config: config.map(|text| serde_json::from_slice(&text).unwrap()),
        }
    }
}

/// A folder in which files go from dialect to dialect under one name, which is part of their metadata.
struct Way<'a> {
    folder: tempfile::TempDir,
    base: &'a BaseModel,
}

impl<'a> Way<'a> {
    fn new(base: &'a BaseModel) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), base }
    }

    fn path(&self, step: usize) -> PathBuf {
        let folder = self.folder.path().join(step.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        folder.join("adapter.safetensors")
    }

    fn written(&self, dialect: Dialect, modules: &[AdaptedModule], metadata: &BTreeMap<String, String>) -> PathBuf {
        let path = self.path(0);
        write_adapter(&path, dialect, self.base.family(), modules, metadata, None).unwrap();
        path
    }

    fn read(&self, path: &Path) -> AdapterFile {
        let file = AdapterFile::read(path, self.base).unwrap();
        assert_eq!(file.unapplied, []);
        file
    }

    /// Reads a file and writes it in another dialect.
    fn converted(&self, from: &Path, dialect: Dialect, step: usize) -> PathBuf {
        let path = self.path(step);
        write_adapter_file(&path, dialect, self.base.family(), &self.read(from), None).unwrap();
        path
    }
}

/// Through `over` and back: tensors to the byte, and every word of the metadata that was there.
fn there_and_back(
    base: &BaseModel,
    from: Dialect,
    over: Dialect,
    modules: &[AdaptedModule],
    said: &BTreeMap<String, String>,
) {
    let way = Way::new(base);
    let first = way.written(from, modules, said);
    let other = way.converted(&first, over, 1);
    let back = Content::of(&way.converted(&other, from, 2));
    let (first, other) = (Content::of(&first), Content::of(&other));
    assert_eq!(back.tensors, first.tensors, "{from} over {over}");
    assert_eq!(back.config, first.config, "{from} over {over}");
    let scales = |key: &str| key == "lora_adapter_metadata";
    for (key, value) in said.iter().filter(|(key, _)| !scales(key)) {
        assert_eq!(other.metadata.get(key), Some(value), "{key} in {over}");
    }
    for (key, value) in &first.metadata {
        assert_eq!(back.metadata.get(key), Some(value), "{key}: {from} over {over}");
    }
}

const DIFFUSION: [Component; 3] = [Component::Unet, Component::TextEncoder, Component::TextEncoder2];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_family_of_kohya_goes_over_comfy_and_itself(
        index in 0_usize..3, count in 1_usize..40, seed in any::<u64>(), said in metadata(),
    ) {
        let base = diffusion_base(index);
        let modules = modules(base, &DIFFUSION, LYCORIS, count, seed);
        prop_assume!(!modules.is_empty());
        for over in [Dialect::Kohya, Dialect::Comfy] {
            there_and_back(base, Dialect::Kohya, over, &modules, &said);
            there_and_back(base, Dialect::Comfy, over, &modules, &said);
        }
    }

    #[test]
    fn lora_of_mixed_ranks_goes_over_every_dialect_of_diffusion_models(
        index in 0_usize..3, count in 1_usize..40, seed in any::<u64>(), said in metadata(),
    ) {
        let base = diffusion_base(index);
        let modules = modules(base, &DIFFUSION, &[Kind::Lora], count, seed);
        prop_assume!(!modules.is_empty());
        let dialects = [Dialect::Kohya, Dialect::Comfy, Dialect::Diffusers];
        for from in dialects {
            for over in dialects {
                there_and_back(base, from, over, &modules, &said);
            }
        }
    }

    #[test]
    fn dora_goes_over_every_dialect_of_diffusion_models(
        index in 0_usize..3, count in 1_usize..24, seed in any::<u64>(),
    ) {
        let base = diffusion_base(index);
        let modules = modules(base, &DIFFUSION, &[Kind::DoraOut], count, seed);
        prop_assume!(!modules.is_empty());
        for over in [Dialect::Kohya, Dialect::Comfy, Dialect::Diffusers] {
            there_and_back(base, Dialect::Kohya, over, &modules, &BTreeMap::new());
            there_and_back(base, Dialect::Diffusers, over, &modules, &BTreeMap::new());
        }
    }

    #[test]
    fn a_component_goes_over_a_folder_of_peft(
        index in 0_usize..3, kind in prop::sample::select(vec![Kind::Lora, Kind::DoraOut, Kind::Loha]), count in 1_usize..24, seed in any::<u64>(), said in metadata(),
    ) {
        let base = diffusion_base(index);
        let modules = modules(base, &[Component::Unet], &[kind], count, seed);
        prop_assume!(!modules.is_empty());
        there_and_back(base, Dialect::Peft, Dialect::Peft, &modules, &said);
        there_and_back(base, Dialect::Kohya, Dialect::Peft, &modules, &said);
        there_and_back(base, Dialect::Comfy, Dialect::Peft, &modules, &said);
        if kind != Kind::Loha {
            there_and_back(base, Dialect::Peft, Dialect::Diffusers, &modules, &said);
        }
    }

    #[test]
    fn language_adapters_go_over_peft(
        kind in 0_usize..6, count in 1_usize..16, seed in any::<u64>(), said in metadata(),
    ) {
        let mut random = Random(seed);
        let with_bias = random.pick(&[true, false]);
        let mut modules = match kind {
            0 | 5 => modules(&LLAMA, &[Component::LanguageModel], &[Kind::Lora], count, seed),
            1 => modules(&LLAMA, &[Component::LanguageModel], &[Kind::DoraOut], count, seed),
            2 => modules(&LLAMA, &[Component::LanguageModel], &[Kind::Loha], count, seed),
            3 | 4 => modules(&LLAMA, &[Component::LanguageModel], &[Kind::Lora], count, seed),
            _ => unreachable!("the strategy is below 6"),
        };
        modules.retain(|module| module.path != "model.embed_tokens");
        let terms = random.pick(&[Cayley::Exact, Cayley::Neumann(2), Cayley::Neumann(5), Cayley::Neumann(8)]);
        for module in &mut modules {
            let (out, inner) = (module.weight[0], module.weight[1]);
            match (kind, &mut module.adapter) {
                // Biases of all modules or of none.
                (0, AnyAdapter::Lora(lora)) if with_bias => lora.up_bias = Some(random.array(&[out], module.dtype)),
                (3, adapter) => {
                    let axis = random.pick(&[Axis::Output, Axis::Input]);
                    let shape = if axis == Axis::Output { [out, 1] } else { [1, inner] };
                    let vector = random.array(&shape, module.dtype);
                    *adapter = AnyAdapter::Ia3(Ia3 { vector, axis, kind: Ia3Kind::Factor });
                }
                (4, adapter) => {
                    let blocks = random.array(&[inner / 4, 6], module.dtype);
                    *adapter =
                        AnyAdapter::Oft(Oft { blocks, rescale: None, side: OftSide::Columns(terms) });
                }
                _ => {}
            }
        }
        prop_assume!(!modules.is_empty());
        there_and_back(&LLAMA, Dialect::Peft, Dialect::Peft, &modules, &said);
    }

    /// Factors of one module may be stored in different types: none of them loses a bit.
    #[test]
    fn types_may_differ_inside_a_module(seed in any::<u64>()) {
        let mut random = Random(seed);
        let module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k";
        let weight = SD15.module(Component::Unet, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k").unwrap();
        let [out, inner] = weight.weight[..] else { panic!("a linear layer") };
        let rank = 1 + random.below(5);
        let types = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4M3];
        let tensors: Vec<_> = [("lora_down.weight", vec![rank, inner]), ("lora_up.weight", vec![out, rank]), ("dora_scale", vec![out, 1])]
            .into_iter()
            .map(|(suffix, shape)| {
                let dtype = random.pick(&types);
                let array = random.array(&shape, dtype);
                let data = lora_core::format::TensorData::from_f32(dtype, shape, &array.values).unwrap();
                (format!("{module}.{suffix}"), data)
            })
            .collect();
        let way = Way::new(&SD15);
        let path = way.path(0);
        lora_core::format::write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
        let original = TensorFile::open(&path).unwrap();
        for (step, over) in [Dialect::Kohya, Dialect::Comfy, Dialect::Diffusers].into_iter().enumerate() {
            let other = way.converted(&path, over, 2 * step + 1);
            let back = TensorFile::open(&way.converted(&other, Dialect::Kohya, 2 * step + 2)).unwrap();
            for (key, _) in &tensors {
                prop_assert_eq!(original.array(key).unwrap(), back.array(key).unwrap(), "{} over {}", key, over);
            }
        }
    }
}

/// Every module of the published models, at their true sizes, under every dialect's own names.
#[test]
fn every_module_of_the_published_models_is_written_and_found_again() {
    for family in [Family::Sd1, Family::Sd2, Family::Sdxl] {
        let base = BaseModel::standard(&family).unwrap();
        let mut modules = Vec::new();
        for component in DIFFUSION.into_iter().filter(|component| base.has(*component)) {
            for (path, module) in base.modules(component) {
                if let &[out, ref inner @ ..] = &module.weight[..]
                    && !inner.is_empty()
                    && !path.contains("embeddings")
                {
                    let array = |shape: &[usize]| Array::full(shape, 0.5);
                    let mut up = vec![1; module.weight.len()];
                    up[0] = out;
                    let lora = Lora::new(array(&[&[1], inner].concat()), array(&up), 1.0);
                    let (path, weight) = (path.to_owned(), module.weight.clone());
                    let adapter = AnyAdapter::Lora(lora);
                    modules.push(AdaptedModule { component, path, adapter, weight, dtype: Dtype::F16, turned: false });
                }
            }
        }
        let places = |modules: &[AdaptedModule]| -> BTreeSet<(Component, String)> {
            modules.iter().map(|module| (module.component, module.path.clone())).collect()
        };
        assert_eq!(places(&modules).len(), modules.len());
        assert!(modules.len() > 300, "{family}: {}", modules.len());
        let way = Way::new(&base);
        for dialect in [Dialect::Kohya, Dialect::Diffusers, Dialect::Comfy] {
            let path = way.written(dialect, &modules, &BTreeMap::new());
            assert_eq!(places(&way.read(&path).modules), places(&modules), "{family} in {dialect}");
            // Without a base, the names alone lead there.
            let (published, found) = AdapterFile::of_published(&TensorFile::read(&path).unwrap()).unwrap();
            assert_eq!((places(&published.modules), found), (places(&modules), family.clone()), "{dialect}");
        }
    }
}
