//! Every module of the real Stable Diffusion models is found under every name that a file may give it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use lora_core::format::{BaseModel, Component, Found, ModuleKind, Names};

struct Row {
    component: Component,
    path: String,
    ldm: String,
    class: String,
    shape: Vec<usize>,
    bias: bool,
}

fn table(name: &str, component: Component) -> Vec<Row> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/names");
    let text = std::fs::read_to_string(folder.join(name)).unwrap();
    let row = |line: &str| {
        let [path, ldm, class, shape, bias, _] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        Row {
            component,
            path: path.to_owned(),
            ldm: ldm.to_owned(),
            class: class.to_owned(),
            shape: shape.split('x').map(|length| length.parse().unwrap()).collect(),
            bias: bias == "bias",
        }
    };
    text.lines().skip(2).map(row).collect()
}

fn base(rows: &[Row]) -> BaseModel {
    BaseModel::from_shapes(rows.iter().flat_map(|row| {
        let weight = Some((row.component, format!("{}.weight", row.path), row.shape.clone()));
        let bias = row.bias.then(|| (row.component, format!("{}.bias", row.path), vec![row.shape[0]]));
        weight.into_iter().chain(bias)
    }))
}

fn check(rows: &[Row], prefixes: &[(Component, &str, &str)]) {
    let base = base(rows);
    let names = Names::of(&base);
    let find = |name: &str| match names.find(name) {
        Found::Module(place) => place,
        other => panic!("{name}: {other:?}"),
    };
    for row in rows {
        let place = (row.component, row.path.clone());
        let (_, flat, dotted) = prefixes.iter().find(|(component, _, _)| *component == row.component).unwrap();
        assert_eq!(find(&format!("{flat}{}", row.path.replace('.', "_"))), place);
        assert_eq!(find(&format!("{dotted}{}", row.path)), place);
        if row.component == Component::Unet {
            assert_eq!(find(&format!("lora_unet_{}", row.ldm.replace('.', "_"))), place);
            assert_eq!(find(&format!("lycoris_{}", row.path.replace('.', "_"))), place);
            assert_eq!(find(&format!("diffusion_model.{}", row.ldm)), place);
            assert_eq!(find(&row.path), place);
            assert_eq!(find(&format!("unet.base_model.model.{}", row.path)), place);
        } else if let Some(bare) = row.path.strip_prefix("text_model.") {
            assert_eq!(find(&format!("{dotted}{bare}")), place);
        }
        let module = base.module(row.component, &row.path).unwrap();
        let kind = match &*row.class {
            "Linear" => ModuleKind::Linear,
            "Conv2d" => ModuleKind::Conv,
            "Embedding" => ModuleKind::Embedding,
            _ => ModuleKind::Norm,
        };
        assert_eq!((module.kind, &module.weight, module.bias), (kind, &row.shape, row.bias), "{}", row.path);
    }
}

#[test]
fn stable_diffusion_1_and_2() {
    for model in ["sd15", "sd21"] {
        let mut rows = table(&format!("{model}.unet.tsv"), Component::Unet);
        rows.extend(table(&format!("{model}.text_encoder.tsv"), Component::TextEncoder));
        let prefixes =
            [(Component::Unet, "lora_unet_", "unet."), (Component::TextEncoder, "lora_te_", "text_encoder.")];
        check(&rows, &prefixes);
        // A file made for a base of two encoders may call the only one the first.
        check(&rows, &[prefixes[0], (Component::TextEncoder, "lora_te1_", "text_encoder.")]);
    }
}

#[test]
fn stable_diffusion_xl() {
    let mut rows = table("sdxl.unet.tsv", Component::Unet);
    rows.extend(table("sdxl.text_encoder.tsv", Component::TextEncoder));
    rows.extend(table("sdxl.text_encoder_2.tsv", Component::TextEncoder2));
    check(
        &rows,
        &[
            (Component::Unet, "lora_unet_", "unet."),
            (Component::TextEncoder, "lora_te1_", "text_encoder."),
            (Component::TextEncoder2, "lora_te2_", "text_encoder_2."),
        ],
    );
}

#[test]
fn what_the_base_lacks_is_told_apart() {
    let base = base(&table("sd15.unet.tsv", Component::Unet));
    let names = Names::of(&base);
    for (name, found) in [
        ("lora_unet_down_blocks_7_attentions_0_proj_in", Found::NoModule(Component::Unet)),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", Found::NoComponent(Component::TextEncoder2)),
        ("base_model.model.model.layers.0.self_attn.q_proj", Found::NoComponent(Component::LanguageModel)),
        ("lora_unet_double_blocks_0_img_attn_proj", Found::OtherFamily("FLUX")),
        ("nonsense", Found::Unknown),
        ("", Found::Unknown),
    ] {
        assert_eq!(names.find(name), found, "{name}");
    }
}
