//! The formulas of each family against weights that the peers merged (sd-scripts, LyCORIS, peft; see each case's manifest).
//!
//! Adapters are put together by hand from the files' tensors, so that nothing but the arithmetic is judged here; reading
//! the same files by their keys is judged by the format tests.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use lora_core::{
    Adapter, AnyAdapter, Array, Cpu, Init, ScaleRule,
    adapter::{
        Axis, Boft, Cayley, Direction, Dora, Full, Glora, GloraOrder, Ia3, Ia3Kind, KronFactor, Loha, Lokr, Lora, Oft,
        OftSide, StrengthRule,
    },
    format::TensorFile,
};

/// The tolerance of the manifests: 32-bit sums in another order.
const RELATIVE: f32 = 1e-5;
const ABSOLUTE: f32 = 2e-6;

const TO_Q: &str = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
const FF_IN: &str = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj";
const FF_OUT: &str = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2";
const PROJ_IN: &str = "unet.mid_block.attentions.0.proj_in";
const CONV: &str = "unet.up_blocks.1.resnets.0.conv1";
const MID_CONV: &str = "unet.mid_block.resnets.0.conv1";
const FC1: &str = "text_encoder.text_model.encoder.layers.0.mlp.fc1";

#[test]
fn lora_and_locon() {
    check("kohya_sd15_linear", 1.0, &[TO_Q, FF_IN, PROJ_IN, FC1], |module| AnyAdapter::Lora(module.lora()));
    check("kohya_sd15_locon", 0.7, &[TO_Q, MID_CONV, FC1], |module| AnyAdapter::Lora(module.lora()));
    check("lycoris_locon_tucker", 0.8, &[TO_Q, CONV, MID_CONV], |module| AnyAdapter::Lora(module.lora()));
}

#[test]
fn rslora_and_bias_of_peft() {
    check("peft_rslora", 1.0, &["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"], |module| {
        let scale = ScaleRule::RankRoot.scale(2.0, 4);
        AnyAdapter::Lora(Lora { scale, ..module.peft_lora() })
    });
    check("peft_lora_bias", 1.0, &["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"], |module| {
        AnyAdapter::Lora(Lora { scale: 2.0, up_bias: module.find("lora_B.bias"), ..module.peft_lora() })
    });
}

/// The file as peft saved it and as peft converted it, of which the second is a plain LoRA of twice the rank.
#[test]
fn starts_that_are_taken_out_of_the_base() {
    for (init, plain, converted) in
        [(Init::Pissa, "peft_pissa", "peft_pissa_converted"), (Init::Olora, "peft_olora", "peft_olora_converted")]
    {
        for layer in ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"] {
            check(plain, 1.0, &[layer], |module| {
                let lora = module.peft_lora();
                let start = Lora::start_of(&Cpu, &module.base, init, lora.down.shape[0], 1.0).unwrap();
                assert!(start.is_some());
                let whole = Lora { start, ..lora };
                let wide = whole.widened(&Cpu).unwrap();
                assert_eq!(wide.down.shape[0], 2 * whole.down.shape[0]);
                close(&wide.delta(&Cpu, &module.base).unwrap(), &whole.delta(&Cpu, &module.base).unwrap(), "widened");
                AnyAdapter::Lora(whole)
            });
            check(converted, 1.0, &[layer], |module| AnyAdapter::Lora(module.peft_lora()));
        }
    }
}

#[test]
fn dora_along_both_axes_with_both_rules() {
    let dora = |direction: Direction<Array>, magnitude, axis| Dora {
        direction,
        magnitude,
        axis,
        rule: StrengthRule::Interpolate,
    };
    check("lycoris_dora_out_scaled", 0.6, &[TO_Q, CONV], |module| {
        AnyAdapter::Dora(dora(Direction::Lora(module.lora()), module.get("dora_scale"), Axis::Output))
    });
    check("lycoris_dora_in_scaled", 0.6, &[TO_Q, PROJ_IN, MID_CONV], |module| {
        AnyAdapter::Dora(dora(Direction::Lora(module.lora()), module.get("dora_scale"), Axis::Input))
    });
    check("lycoris_loha_dora", 0.6, &[FF_IN, CONV], |module| {
        AnyAdapter::Dora(dora(Direction::Loha(module.loha()), module.get("dora_scale"), Axis::Output))
    });
    check("lycoris_lokr_dora", 0.6, &[FF_IN, CONV], |module| {
        AnyAdapter::Dora(dora(Direction::Lokr(module.lokr()), module.get("dora_scale"), Axis::Output))
    });
    check("peft_dora_scaled", 0.4, &["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"], |module| {
        let direction = Direction::Lora(Lora { scale: 2.0, ..module.peft_lora() });
        let magnitude = module.get("lora_magnitude_vector");
        AnyAdapter::Dora(Dora { direction, magnitude, axis: Axis::Output, rule: StrengthRule::KeepMagnitudes })
    });
}

#[test]
fn loha_with_and_without_cores() {
    check("lycoris_loha", 1.0, &[TO_Q, PROJ_IN, FC1], |module| AnyAdapter::Loha(module.loha()));
    check("lycoris_loha_tucker", 0.7, &[TO_Q, CONV, MID_CONV], |module| AnyAdapter::Loha(module.loha()));
    check("peft_loha", 1.0, &["model.layers.0.self_attn.q_proj"], |module| {
        AnyAdapter::Loha(Loha { scale: 2.0, ..module.loha() })
    });
}

#[test]
fn lokr_in_every_combination_of_factors() {
    let lokr = |module: &Module| AnyAdapter::Lokr(module.lokr());
    check("lycoris_lokr_full", 1.0, &[TO_Q, FF_IN, PROJ_IN, MID_CONV], lokr);
    check("lycoris_lokr_w2", 1.0, &[FC1, FF_IN, FF_OUT, CONV], lokr);
    check("lycoris_lokr_both", 1.0, &[FF_IN, FF_OUT], lokr);
    check("lycoris_lokr_conv_flat", 1.0, &[CONV], lokr);
    check("lycoris_lokr_tucker", 1.0, &[CONV], lokr);
    check(
        "peft_lokr_factors",
        1.0,
        &["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
        |module| AnyAdapter::Lokr(Lokr { scale: 2.0, ..module.lokr() }),
    );
}

#[test]
fn glora() {
    check("lycoris_glora", 0.7, &[TO_Q, FF_IN, PROJ_IN], |module| {
        AnyAdapter::Glora(Glora {
            a1: module.get("a1.weight"),
            a2: module.get("a2.weight"),
            b1: module.get("b1.weight"),
            b2: module.get("b2.weight"),
            order: GloraOrder::Current,
            scale: module.scale(2),
        })
    });
}

#[test]
fn full_differences_of_layers_and_norms() {
    check("lycoris_full", 0.5, &[TO_Q, FF_IN, MID_CONV, FC1], |module| {
        AnyAdapter::Full(Full { diff: module.find("diff"), diff_bias: module.find("diff_b") })
    });
    check("lycoris_norm", 0.7, &["unet.mid_block.resnets.0.norm1", "unet.mid_block.attentions.0.norm"], |module| {
        AnyAdapter::Full(Full { diff: module.find("w_norm"), diff_bias: module.find("b_norm") })
    });
}

#[test]
fn ia3_of_lycoris_and_of_peft() {
    let offsets = |axis| {
        move |module: &Module| AnyAdapter::Ia3(Ia3 { vector: module.get("weight"), axis, kind: Ia3Kind::Offset })
    };
    check("lycoris_ia3_in", 0.8, &[FF_IN, FF_OUT, CONV], offsets(Axis::Input));
    check("lycoris_ia3_out", 0.8, &[CONV], offsets(Axis::Output));
    let factors =
        |axis| move |module: &Module| AnyAdapter::Ia3(Ia3 { vector: module.get("ia3_l"), axis, kind: Ia3Kind::Factor });
    check(
        "peft_ia3",
        1.0,
        &["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"],
        factors(Axis::Output),
    );
    check("peft_ia3", 1.0, &["model.layers.0.mlp.down_proj"], factors(Axis::Input));
}

#[test]
fn oft_of_sd_scripts_and_lycoris() {
    let oft = |bound: fn(&Module) -> Option<f64>| {
        move |module: &Module| {
            AnyAdapter::Oft(Oft {
                blocks: module.get("oft_blocks"),
                rescale: module.find("rescale"),
                side: OftSide::Rows { bound: bound(module) },
            })
        }
    };
    let bounded = |module: &Module| Some(module.alpha() * module.base.shape[0] as f64);
    check("lycoris_oft_scaled", 0.5, &[TO_Q, CONV], oft(|_| None));
    check("lycoris_oft_constraint", 1.0, &[TO_Q, MID_CONV], oft(bounded));
    check("lycoris_oft_rescaled", 1.0, &[FF_IN, MID_CONV], oft(|_| None));
    check("kohya_oft_scaled", 0.6, &[TO_Q], oft(bounded));
}

#[test]
fn oft_of_peft_exact_and_cut_off() {
    let oft = |cayley| {
        move |module: &Module| {
            AnyAdapter::Oft(Oft { blocks: module.get("oft_R.weight"), rescale: None, side: OftSide::Columns(cayley) })
        }
    };
    check("peft_oft", 1.0, &["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"], oft(Cayley::Exact));
    let layers = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"];
    check("peft_oft_neumann", 1.0, &layers, oft(Cayley::Neumann(5)));
}

#[test]
fn boft() {
    let boft = |module: &Module| {
        AnyAdapter::Boft(Boft { blocks: module.get("oft_blocks"), rescale: module.find("rescale"), bound: None })
    };
    let block = "unet.down_blocks.0.attentions.0.transformer_blocks.0";
    let layers =
        [format!("{block}.attn1.to_q"), format!("{block}.ff.net.0.proj"), "unet.down_blocks.0.resnets.0.conv1".into()];
    check("lycoris_boft", 1.0, &layers.each_ref().map(String::as_str), boft);
    check("lycoris_boft_rescaled", 0.7, &[&format!("{block}.attn1.to_k")], boft);
}

/// Merges the adapter of each module of a case and compares weight and bias with the peer's.
#[track_caller]
fn check(case: &str, strength: f64, modules: &[&str], build: impl Fn(&Module) -> AnyAdapter<Array>) {
    let expected = open(&format!("{case}/expected.safetensors"));
    for name in modules {
        let module = Module::new(case, name);
        let adapter = build(&module);
        let merged = adapter.merge(&Cpu, &module.base, strength).unwrap();
        let weight = expected.array(&format!("{name}.weight"));
        let bias = expected.array(&format!("{name}.bias"));
        assert!(weight.is_ok() || bias.is_ok(), "{case}: {name} is not among what changes");
        if let Ok(weight) = weight {
            close(&merged, &weight, &format!("{case}: {name}"));
        }
        let merged_bias = adapter.merge_bias(&Cpu, module.bias.as_ref(), strength).unwrap();
        if let Ok(bias) = bias {
            close(&merged_bias.unwrap(), &bias, &format!("{case}: bias of {name}"));
        } else {
            assert_eq!(merged_bias, module.bias, "{case}: bias of {name}");
        }
    }
}

/// One module's part of an adapter file, and what it sits on.
struct Module {
    file: TensorFile,
    prefix: String,
    base: Array,
    bias: Option<Array>,
}

impl Module {
    fn new(case: &str, name: &str) -> Self {
        let (component, path) = name.split_once('.').unwrap();
        let (base, adapter, tensors, prefix) = match component {
            "model" => {
                let base = if case == "peft_lora_bias" { "qwen2" } else { "llama" };
                (
                    format!("bases/{base}/model.safetensors"),
                    "adapter/adapter_model.safetensors",
                    name,
                    format!("base_model.model.{name}"),
                )
            }
            _ => {
                let start = match (component, case.contains("kohya_oft")) {
                    (_, true) => "oft_unet_",
                    ("unet", _) => "lora_unet_",
                    _ => "lora_te_",
                };
                (
                    format!("bases/sd15/{component}.safetensors"),
                    "adapter.safetensors",
                    path,
                    format!("{start}{}", path.replace('.', "_")),
                )
            }
        };
        let base = open(&base);
        Self {
            file: open(&format!("{case}/{adapter}")),
            prefix,
            base: base.array(&format!("{tensors}.weight")).unwrap(),
            bias: base.array(&format!("{tensors}.bias")).ok(),
        }
    }

    fn find(&self, suffix: &str) -> Option<Array> {
        self.file.array(&format!("{}.{suffix}", self.prefix)).ok()
    }

    #[track_caller]
    fn get(&self, suffix: &str) -> Array {
        self.find(suffix).unwrap_or_else(|| panic!("no {}.{suffix}", self.prefix))
    }

    fn alpha(&self) -> f64 {
        f64::from(self.get("alpha").values[0])
    }

    fn scale(&self, rank: usize) -> f64 {
        ScaleRule::Rank.scale(self.alpha(), rank)
    }

    fn lora(&self) -> Lora<Array> {
        let (down, up) = (self.get("lora_down.weight"), self.get("lora_up.weight"));
        let scale = self.scale(down.shape[0]);
        Lora { mid: self.find("lora_mid.weight"), ..Lora::new(down, up, scale) }
    }

    /// Of scale 1, which the file does not hold.
    fn peft_lora(&self) -> Lora<Array> {
        Lora::new(self.get("lora_A.weight"), self.get("lora_B.weight"), 1.0)
    }

    fn loha(&self) -> Loha<Array> {
        let w1_b = self.get("hada_w1_b");
        let scale = self.find("alpha").map_or(1.0, |_| self.scale(w1_b.shape[0]));
        Loha {
            w1_a: self.get("hada_w1_a"),
            w1_b,
            w2_a: self.get("hada_w2_a"),
            w2_b: self.get("hada_w2_b"),
            t1: self.find("hada_t1"),
            t2: self.find("hada_t2"),
            scale,
        }
    }

    fn lokr(&self) -> Lokr<Array> {
        let factor = |name: &str, core: Option<Array>| match (self.find(&format!("lokr_{name}")), core) {
            (Some(whole), _) => (KronFactor::Whole(whole), None),
            (None, core) => {
                let (a, b) = (self.get(&format!("lokr_{name}_a")), self.get(&format!("lokr_{name}_b")));
                let rank = Some(b.shape[0]);
                match core {
                    Some(core) => (KronFactor::Tucker { core, a, b }, rank),
                    None => (KronFactor::Product { a, b }, rank),
                }
            }
        };
        let ((w1, first), (w2, second)) = (factor("w1", None), factor("w2", self.find("lokr_t2")));
        let scale = second.or(first).filter(|_| self.find("alpha").is_some()).map_or(1.0, |rank| self.scale(rank));
        Lokr { w1, w2, scale }
    }
}

fn open(file: &str) -> TensorFile {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(file);
    TensorFile::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn close(actual: &Array, expected: &Array, name: &str) {
    assert_eq!(actual.shape, expected.shape, "{name}");
    for (actual, expected) in actual.values.iter().zip(&expected.values) {
        assert!((actual - expected).abs() <= ABSOLUTE + RELATIVE * expected.abs(), "{name}: {actual}, not {expected}");
    }
}
