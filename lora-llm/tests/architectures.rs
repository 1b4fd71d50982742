//! Every family and every option of its configuration, on tiny random models that `fixtures/architectures.py` made.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::{Path, PathBuf};

use lora_llm::{
    Base, BaseFiles, Error,
    generate::{GenerateOptions, Sampling, Session, generate},
};
use lora_torch::{Projections, Torch, Weights};
use tch::{Kind, Tensor};

/// Logits of 32-bit models of this size reach 7; both sides sum in their own order.
const TOLERANCE: f64 = 2e-5;

const NAMES: [&str; 8] =
    ["llama2", "llama3", "llama_linear", "llama_bias", "mistral", "qwen2", "qwen2_window", "qwen3"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures").join(name)
}

fn expected(name: &str) -> impl Fn(&str) -> Tensor {
    let weights = Weights::open(&[folder(name).join("expected.safetensors")]).unwrap();
    move |tensor| weights.root(&Torch::CPU).tensor(tensor, &weights.shape(tensor).unwrap()).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    Vec::<i64>::try_from(tensor.reshape([-1])).unwrap().into_iter().map(|id| id as u32).collect()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn logits_agree_for_every_family() {
    for name in NAMES {
        let expected = expected(name);
        let decoder = Base::open(&folder(name), &Torch::CPU).unwrap().decoder;
        let logits = tch::no_grad(|| decoder.logits(&expected("ids"), None).unwrap());
        let error = difference(&logits, &expected("logits"));
        assert!(error < TOLERANCE, "{name}: {error}");
    }
}

#[test]
fn the_same_ids_are_chosen_with_a_cache() {
    for name in NAMES {
        let expected = expected(name);
        let decoder = Base::open(&folder(name), &Torch::CPU).unwrap().decoder;
        let prompt = ids(&expected("ids").get(0));
        let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: 12, stop: Vec::new() };
        assert_eq!(generate(&decoder, &prompt, &options).unwrap(), ids(&expected("greedy")), "{name}");
    }
}

#[test]
fn a_cache_says_what_reading_everything_says() {
    for name in NAMES {
        let expected = expected(name);
        let decoder = Base::open(&folder(name), &Torch::CPU).unwrap().decoder;
        let text = ids(&expected("ids").get(1));
        let whole = expected("logits").get(1);
        let mut cache = decoder.cache().unwrap();
        // Several at first, then one by one, then several again, and once from an earlier point.
        for (from, to) in [(0, 7), (7, 8), (8, 9), (9, 15), (15, 16), (12, 20)] {
            cache.truncate(from);
            let logits = decoder.next(&text[from..to], &mut cache).unwrap();
            let error = difference(&logits, &whole.get(to as i64 - 1));
            assert!(error < TOLERANCE, "{name} at {to}: {error}");
        }
    }
}

#[test]
fn a_session_goes_on_where_the_texts_part() {
    let decoder = Base::open(&folder("qwen3"), &Torch::CPU).unwrap().decoder;
    let options = GenerateOptions {
        sampling: Sampling { temperature: 1.3, seed: 5, ..Sampling::GREEDY },
        max_tokens: 9,
        stop: Vec::new(),
    };
    let mut session = Session::new(&decoder).unwrap();
    for prompt in [&[5, 6, 7, 8][..], &[5, 6, 7, 8], &[5, 6, 9, 10, 11], &[5], &[7, 7]] {
        let mut continued = Vec::new();
        let mut each = |id| {
            continued.push(id);
            std::ops::ControlFlow::Continue(())
        };
        session.generate(prompt, &options, &mut each).unwrap();
        assert_eq!(continued, generate(&decoder, prompt, &options).unwrap(), "{prompt:?}");
    }
}

#[test]
fn a_text_ends_at_a_stop_id_at_the_models_limit_or_when_told() {
    use lora_llm::generate::Finish;
    use std::ops::ControlFlow;

    let decoder = Base::open(&folder("llama2"), &Torch::CPU).unwrap().decoder;
    let prompt = [5, 6, 7];
    let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: 1000, stop: Vec::new() };
    let all = generate(&decoder, &prompt, &options).unwrap();
    assert_eq!(all.len() + prompt.len(), 65, "the last id is chosen, but not read");
    let mut session = Session::new(&decoder).unwrap();
    let stop = GenerateOptions { stop: vec![all[3]], ..options.clone() };
    let finish = session.generate(&prompt, &stop, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(finish, Finish::Stop(all[3]));
    assert_eq!(session.generate(&prompt, &options, &mut |_| ControlFlow::Break(())).unwrap(), Finish::Caller);
    let error = session.generate(&[5; 65], &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::TooLong { length: 65, limit: 64, .. }), "{error}");
    let error = session.generate(&[48], &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::UnknownToken { id: 48, words: 48 }), "{error}");
}

#[test]
fn half_precision_stays_near() {
    for name in ["llama3", "mistral", "qwen3"] {
        let expected = expected(name);
        let on = Torch::CPU.with_kind(Kind::BFloat16);
        let decoder = Base::open(&folder(name), &on).unwrap().decoder;
        let logits = tch::no_grad(|| decoder.logits(&expected("ids"), None).unwrap()).to_kind(Kind::Float);
        let error = (&logits - expected("logits")).norm().double_value(&[]) / logits.norm().double_value(&[]);
        assert!(error < 0.05, "{name}: {error}");
    }
}

#[test]
fn modules_are_called_as_in_the_checkpoint() {
    let base = BaseFiles::find(&folder("llama3")).unwrap();
    let model = base.model().unwrap();
    let mut decoder = base.load(&Torch::CPU).unwrap().decoder;
    let projections = decoder.projections();
    assert_eq!(projections.len(), 3 * 7 + 2, "seven a layer, the head and the embedding");
    for projection in projections {
        let component = projection.component().unwrap();
        let module = model.module(component, projection.path());
        assert!(module.is_some() || projection.path() == "lm_head", "{}", projection.path());
    }
}

#[test]
fn folders_that_are_no_model_are_refused_with_a_reason() {
    let here = tempfile::tempdir().unwrap();
    let refusal = || BaseFiles::find(here.path()).unwrap_err().to_string();
    assert!(refusal().contains("no `config.json`"), "{}", refusal());
    std::fs::write(here.path().join("adapter_config.json"), "{}").unwrap();
    assert!(refusal().contains("holds an adapter"), "{}", refusal());
    std::fs::write(here.path().join("config.json"), r#"{"model_type": "gemma3"}"#).unwrap();
    assert!(refusal().contains("`gemma3`"), "{}", refusal());
    std::fs::copy(folder("llama2").join("config.json"), here.path().join("config.json")).unwrap();
    std::fs::copy(folder("qwen2").join("model.safetensors"), here.path().join("model.safetensors")).unwrap();
    assert!(Base::open(here.path(), &Torch::CPU).is_err());
    std::fs::copy(folder("qwen3").join("config.json"), here.path().join("config.json")).unwrap();
    std::fs::copy(folder("llama2").join("model.safetensors"), here.path().join("model.safetensors")).unwrap();
    assert!(Base::open(here.path(), &Torch::CPU).is_err());
}

#[test]
fn tensors_of_no_layer_are_refused() {
    let here = tempfile::tempdir().unwrap();
    // The biases of Qwen 2 under the configuration of a Llama of the same shape.
    let config = std::fs::read_to_string(folder("qwen2").join("config.json")).unwrap();
    std::fs::write(here.path().join("config.json"), config.replace("\"qwen2\"", "\"llama\"")).unwrap();
    std::fs::copy(folder("qwen2").join("model.safetensors"), here.path().join("model.safetensors")).unwrap();
    let error = Base::open(here.path(), &Torch::CPU).unwrap_err().to_string();
    assert!(error.contains("9 of its tensors belong to no layer") && error.contains("k_proj.bias"), "{error}");
}
