//! What a person reads, word for word: files of many programs looked at, and everything that can be wrong with one, through
//! the real program. Changed on purpose? `INSTA_UPDATE=always cargo test -p lora-cli --test messages` writes them anew.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::format::{Dtype, TensorData, tensors_to_bytes};
use support::{formats, lora_of};

/// Exit code and both streams, as a person sees them; `@` stands for the folder of the fixtures.
fn seen(folder: &Path, line: &str) -> String {
    let fixtures = formats().display().to_string();
    let words: Vec<String> = line.split_whitespace().map(|word| word.replace('@', &fixtures)).collect();
    let (code, shown, talk) = lora_of(folder, &words.iter().map(String::as_str).collect::<Vec<_>>());
    format!("$ lora {line}\n{}{}exit {code}\n", shown.replace(&fixtures, "@"), talk.replace(&fixtures, "@"))
}

fn all(folder: &Path, lines: &[&str]) -> String {
    lines.iter().map(|line| seen(folder, line)).collect::<Vec<_>>().join("\n")
}

/// A pair of factors for each module, of rank 4, with a suffix for each half.
fn pairs(modules: &[&str], [down, up]: [&str; 2]) -> Vec<(String, TensorData<'static>)> {
    let tensor = |shape: [usize; 2]| TensorData::from_f32(Dtype::F16, shape, &vec![0.125; 4 * 32]).unwrap();
    let pair =
        |module: &&str| [(format!("{module}.{down}"), tensor([4, 32])), (format!("{module}.{up}"), tensor([32, 4]))];
    modules.iter().flat_map(pair).collect()
}

const KOHYA: [&str; 2] = ["lora_down.weight", "lora_up.weight"];
const PEFT: [&str; 2] = ["lora_A.weight", "lora_B.weight"];

fn write(folder: &Path, name: &str, tensors: &[(String, TensorData<'_>)]) {
    fs::write(folder.join(name), tensors_to_bytes(Path::new(name), tensors, &BTreeMap::new()).unwrap()).unwrap();
}

/// A container by its header and the length of its data.
fn raw(folder: &Path, name: &str, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(folder.join(name), bytes).unwrap();
}

#[test]
fn what_files_of_many_programs_are() {
    let folder = tempfile::tempdir().unwrap();
    let files = [
        "kohya_sd15_mixed/adapter.safetensors",
        "kohya_sdxl_ldm_all/adapter.safetensors",
        "kohya_sd15_no_alpha/adapter.safetensors",
        "lycoris_mixed/adapter.safetensors",
        "lycoris_lokr_full/adapter.safetensors",
        "lycoris_bundle/adapter.safetensors",
        "diffusers_sdxl_metadata/adapter.safetensors",
        "peft_rslora_patterns/adapter",
        "peft_embedding/adapter",
        "bases/sdxl",
        "bases/llama",
    ];
    let shown = files.map(|file| {
        let shown = seen(folder.path(), &format!("inspect @/{file}"));
        // The command, its exit code and a blank line for the prompt stand on the screen as well.
        assert!(shown.lines().count() <= 24, "{shown}");
        // A name is not broken, so that it can be copied.
        let fits = |line: &str| line.chars().count() <= 80 || line.contains('@') || !line.trim().contains(' ');
        assert!(shown.lines().skip(1).all(fits), "{shown}");
        shown
    });
    insta::assert_snapshot!(shown.join("\n"));
}

#[test]
fn adapters_of_models_that_are_not_read_are_named_and_refused() {
    let folder = tempfile::tempdir().unwrap();
    let files: [(&str, &[&str], [&str; 2]); 10] = [
        ("flux-kohya", &["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_3_linear1"], KOHYA),
        ("flux-diffusers", &["transformer.single_transformer_blocks.0.attn.to_q"], PEFT),
        ("sd3", &["lora_unet_joint_blocks_0_context_block_attn_qkv"], KOHYA),
        ("wan", &["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.k"], PEFT),
        ("qwen-image", &["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mlp.net.2"], PEFT),
        ("hunyuan-video", &["diffusion_model.double_blocks.0.img_attn_qkv"], PEFT),
        ("z-image", &["diffusion_model.layers.0.attention.qkv"], PEFT),
        ("cascade", &["lora_prior_unet_down_blocks_0_0_mapper"], KOHYA),
        ("ltx", &["transformer.transformer_blocks.0.attn1.to_q"], PEFT),
        ("nobody", &["lora_unet_strange_place"], KOHYA),
    ];
    let mut shown = Vec::new();
    for (name, modules, suffixes) in files {
        let name = format!("{name}.safetensors");
        write(folder.path(), &name, &pairs(modules, suffixes));
        shown.push(seen(folder.path(), &format!("inspect {name}")));
        shown.push(seen(folder.path(), &format!("check {name} --base @/bases/sd15")));
    }
    shown.push(seen(folder.path(), "convert wan.safetensors out.safetensors --to kohya"));
    shown.push(seen(folder.path(), "merge --base @/bases/sdxl --lora flux-kohya.safetensors --out out"));
    insta::assert_snapshot!(shown.join("\n"));
}

#[test]
fn an_adapter_for_another_base_says_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    insta::assert_snapshot!(all(
        folder.path(),
        &[
            "check @/kohya_sdxl_te2/adapter.safetensors --base @/bases/sd15",
            "check @/kohya_sdxl_ldm/adapter.safetensors --base @/bases/sd15",
            "check @/kohya_sd15_linear/adapter.safetensors --base @/bases/llama",
            "check @/peft_lora/adapter --base @/bases/sd21",
            "merge --base @/bases/sd21 --lora @/kohya_sd15_linear/adapter.safetensors --out out",
            "convert @/kohya_sd15_linear/adapter.safetensors out --to peft",
            "convert @/lycoris_loha/adapter.safetensors out.safetensors --to diffusers",
            "check @/bases/sd15/unet.safetensors --base @/bases/sd15",
        ]
    ));
}

#[test]
fn broken_files_say_what_is_wrong_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = fs::read(formats().join("kohya_sd15_linear/adapter.safetensors")).unwrap();
    fs::write(at("half.safetensors"), &whole[..whole.len() / 2]).unwrap();
    fs::write(at("header-cut.safetensors"), &whole[..500]).unwrap();
    fs::write(at("empty.safetensors"), "").unwrap();
    fs::write(at("zeros.safetensors"), [0; 4096]).unwrap();
    fs::write(at("text.safetensors"), "Access to this model is restricted.\n").unwrap();
    fs::write(at("pointer.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:00\n").unwrap();
    fs::write(at("long.safetensors"), [&(1_u64 << 60).to_le_bytes()[..], b"{}"].concat()).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let tensor = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    raw(folder.path(), "twice.safetensors", &format!(r#"{{"a":{tensor},"a":{tensor}}}"#), 4);
    raw(folder.path(), "nothing.safetensors", r#"{"__metadata__":{"a":"b"}}"#, 0);
    raw(folder.path(), "embedding.safetensors", &format!(r#"{{"emb_params":{tensor}}}"#), 4);
    let shown = all(
        folder.path(),
        &[
            "inspect half.safetensors",
            "inspect header-cut.safetensors",
            "inspect empty.safetensors",
            "inspect zeros.safetensors",
            "inspect text.safetensors",
            "inspect pointer.safetensors",
            "inspect long.safetensors",
            "inspect folder",
            "inspect gone.safetensors",
            "inspect twice.safetensors",
            "inspect nothing.safetensors",
            "check nothing.safetensors --base @/bases/sd15",
            "inspect embedding.safetensors",
            "check embedding.safetensors --base @/bases/sd15",
            "check @/kohya_sd15_linear/adapter.safetensors --base gone",
            "check @/kohya_sd15_linear/adapter.safetensors --base text.safetensors",
            "merge --base @/bases/sd15 --lora half.safetensors --out out",
        ],
    );
    insta::assert_snapshot!(shown);
}

#[test]
fn factors_that_do_not_fit_are_named_with_both_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let tensor = |shape: &[usize], value: f32| {
        TensorData::from_f32(Dtype::F32, shape, &vec![value; shape.iter().product()]).unwrap()
    };
    let file = |name: &str, tensors: &[(&str, &[usize], f32)]| {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(suffix, shape, value)| (format!("{module}.{suffix}"), tensor(shape, *value)))
            .collect();
        write(folder.path(), name, &tensors);
    };
    let [down, up] = KOHYA;
    file("alone.safetensors", &[(down, &[2, 12], 0.5)]);
    file("wide.safetensors", &[(down, &[2, 13], 0.5), (up, &[12, 2], 0.5)]);
    file("ranks.safetensors", &[(down, &[2, 12], 0.5), (up, &[12, 3], 0.5)]);
    file("nan.safetensors", &[(down, &[2, 12], f32::NAN), (up, &[12, 2], 0.5)]);
    file("alpha.safetensors", &[(down, &[2, 12], 0.5), (up, &[12, 2], 0.5), ("alpha", &[], f32::INFINITY)]);
    file("families.safetensors", &[(down, &[2, 12], 0.5), (up, &[12, 2], 0.5), ("diff", &[12, 12], 0.5)]);
    let evil = "lora_unet_\u{1b}[2J\u{202e}evil";
    write(folder.path(), "evil.safetensors", &pairs(&[evil, &"x".repeat(5000)], KOHYA));
    let files = ["alone", "wide", "ranks", "nan", "alpha", "families", "evil"];
    let mut shown: Vec<String> = files
        .iter()
        .map(|name| seen(folder.path(), &format!("check {name}.safetensors --base @/bases/sd15")))
        .collect();
    shown.extend(["nan", "alpha", "evil"].map(|name| seen(folder.path(), &format!("inspect {name}.safetensors"))));
    let shown = shown.join("\n");
    assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{shown:?}");
    assert!(shown.lines().all(|line| line.chars().count() < 1500), "a name floods the screen");
    insta::assert_snapshot!(shown);
}

/// A file that is somebody else's.
#[cfg(unix)]
#[test]
fn a_file_without_permission_is_no_missing_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret.safetensors");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    // The superuser may read anything, and nothing can be shown then.
    if fs::read(&path).is_err() {
        let shown = seen(folder.path(), "inspect secret.safetensors");
        assert!(shown.contains("Permission denied") && shown.contains("is it yours to read?"), "{shown}");
    }
}
