"""Writes the seeds beside it, out of lora-core's fixtures: `python make.py`. Standard library only."""

import json
import re
import struct
import zipfile
from pathlib import Path

here = Path(__file__).parent
fixtures = here / "../../lora-core/tests/fixtures"
source = (here / "../src/lib.rs").read_text()


def table(name):
    """The strings of a table in `src/lib.rs`: descriptions of tensors name their entries by index."""
    return re.findall(r'^    "(.*)",$', source.split(f"const {name}")[1].split("];")[0], re.M)


SPELLINGS, SUFFIXES = table("SPELLINGS"), table("SUFFIXES")


def seed(target, name, content):
    folder = here / target
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def container(tensors, metadata=None):
    """Tensors of zeros: `{name: (dtype, bytes of a number, shape)}`."""
    fields, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, size, shape) in tensors.items():
        begin = end
        for length in shape:
            size *= length
        end += size
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def described(tensors):
    """The description of tensors as `described` of `src/lib.rs` reads it: all F32."""
    out = bytearray()
    for index, (key, shape) in enumerate(tensors.items()):
        spelling, suffix = next(
            (s, key[len(s) + 1 :]) for s in SPELLINGS if key.startswith(s + ".") and key[len(s) + 1 :] in SUFFIXES
        )
        out += bytes([SPELLINGS.index(spelling), SUFFIXES.index(suffix), len(shape), *shape, 3 + index, 5])
    return bytes(out)


# --- container
seed("container", "plain", container({"a": ("F32", 4, [2, 2]), "b": ("BF16", 2, [3]), "c": ("I64", 8, [])}))
seed("container", "metadata", container({"lora_unet_x.alpha": ("F16", 2, [1])}, {"ss_seed": "7", "ü": "\n"}))
seed("container", "narrow", container({"a": ("F8_E4M3", 1, [4]), "b": ("F8_E5M2", 1, [0, 3]), "c": ("BOOL", 1, [2])}))
for path in sorted((fixtures / "formats/hostile").glob("*.safetensors")):
    if path.stat().st_size < 700:
        seed("container", path.stem, path.read_bytes())

# --- keys: two of every suffix that the fixtures have
seen, lines = {}, []
for path in sorted((fixtures / "formats").glob("*/**/adapter*.safetensors")):
    for key in header(path):
        suffix = re.sub(r"\d+", "", ".".join(key.split(".")[-2:]))
        if seen.setdefault((suffix, key[:8]), 0) < 1:
            seen[suffix, key[:8]] += 1
            lines.append(key)
for index in range(0, len(lines), 24):
    seed("keys", f"fixtures-{index // 24}", "\n".join(lines[index : index + 24]))
seed("keys", "other-families", "\n".join(f"{name}.lora_A.weight" for name in SPELLINGS if "_blocks" in name))

# --- adapter: one of every family, on a module of four by four
unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
conv = "lora_unet_down_blocks_0_resnets_0_conv1"
norm = "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1"
lora = {f"{unet}.lora_down.weight": [2, 4], f"{unet}.lora_up.weight": [4, 2]}
families = {
    "lora": {**lora, f"{unet}.alpha": []},
    "locon": {f"{conv}.lora_down.weight": [2, 4, 3, 3], f"{conv}.lora_up.weight": [4, 2, 1, 1]},
    "tucker": {
        f"{conv}.lora_down.weight": [2, 4, 1, 1],
        f"{conv}.lora_up.weight": [4, 2, 1, 1],
        f"{conv}.lora_mid.weight": [2, 2, 3, 3],
    },
    "dora-in": {**lora, f"{unet}.dora_scale": [1, 4]},
    "dora-out": {**lora, f"{unet}.dora_scale": [4, 1]},
    "loha": {f"{unet}.hada_w{i}_{s}": shape for i in (1, 2) for s, shape in (("a", [4, 2]), ("b", [2, 4]))},
    "loha-tucker": {
        **{f"{conv}.hada_w{i}_{s}": [2, 4] for i in (1, 2) for s in "ab"},
        **{f"{conv}.hada_t{i}": [2, 2, 3, 3] for i in (1, 2)},
    },
    "lokr": {f"{unet}.lokr_w1": [2, 2], f"{unet}.lokr_w2_a": [2, 1], f"{unet}.lokr_w2_b": [1, 2]},
    "lokr-tucker": {
        f"{conv}.lokr_w1": [2, 2],
        f"{conv}.lokr_w2_a": [1, 2],
        f"{conv}.lokr_w2_b": [1, 2],
        f"{conv}.lokr_t2": [1, 1, 3, 3],
    },
    "glora": {f"{unet}.{s}.weight": shape for s, shape in (("a1", [4, 2]), ("a2", [2, 4]), ("b1", [4, 2]), ("b2", [2, 4]))},
    "full": {f"{unet}.diff": [4, 4], f"{unet}.diff_b": [4], f"{norm}.w_norm": [4], f"{norm}.b_norm": [4]},
    "ia3": {f"{unet}.weight": [4], f"{unet}.on_input": []},
    "oft": {f"{unet}.oft_blocks": [2, 2, 2], f"{unet}.alpha": [], f"{unet}.rescale": [4, 1]},
    "boft": {f"{unet}.oft_blocks": [2, 2, 2, 2], f"{unet}.alpha": []},
    "old": {**lora, f"{unet}.bias_indices": [2, 2], f"{unet}.bias_values": [2], f"{unet}.bias_size": [2]},
    "set": {f"{unet}.set_weight": [4, 4], f"{conv}.reshape_weight": [4]},
    "diffusers": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": [2, 4],
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": [4, 2],
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": [1, 4],
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": [4, 1],
    },
    "language": {
        "model.embed_tokens.lora_embedding_A": [2, 6],
        "model.embed_tokens.lora_embedding_B": [4, 2],
        "model.layers.0.mlp.down_proj.lora_A.weight": [2, 6],
        "model.layers.0.mlp.down_proj.lora_B.weight": [4, 2],
        "model.layers.0.mlp.down_proj.lora_magnitude_vector": [4],
        "model.layers.0.self_attn.q_proj.base_layer.weight": [4, 4],
    },
    "rows": {"model.embed_tokens.token_adapter.trainable_tokens_delta": [2, 4]},
    "peft-oft": {"model.layers.0.self_attn.q_proj.oft_R.weight": [2, 1]},
    "peft-ia3": {"model.layers.0.self_attn.q_proj.ia3_l": [4, 1], "model.layers.0.mlp.down_proj.ia3_l": [1, 6]},
}
for name, tensors in families.items():
    seed("adapter", name, described(tensors))

# --- metadata: a letter for a known key (its code modulo 16), or key=value, one a line
frequency = json.dumps({"10_ohwx dog": {"ohwx": 40, "grass": 7}, "reg": {"grass": 2}})
seed("metadata", "kohya", f"@{frequency}\nB40\nC1200\nEnan\nFtorch.optim.AdamW\nGstyle\nHsd_v1\nI{{}}\nJTitle\nKohwx, dog")
seed("metadata", "broken", '@{"a": {"b": -1}}\nA[]\nB-3\nC1e99\nnote=\x1b[2J\n=\nK,, ,\n\u202etxt=\u202e')
seed("metadata", "diffusers", 'M{"unet.r": 4, "unet.lora_alpha": 8}\nformat=pt')

# --- peft_config: the configuration, a zero byte, tensors
language = described(families["language"])
for path in sorted((fixtures / "formats").glob("peft_*/adapter/adapter_config.json")):
    fields = {key: value for key, value in json.loads(path.read_text()).items() if value not in (None, {}, [], False)}
    kind = fields.get("peft_type", "LORA")
    tensors = {"IA3": described(families["peft-ia3"]), "OFT": described(families["peft-oft"])}.get(kind, language)
    if "trainable_token_indices" in fields:
        tensors = described(families["rows"])
    text = json.dumps(fields, separators=(",", ":"))
    seed("peft_config", path.parent.parent.name, text.encode() + b"\0" + tensors)

# --- pickle: 0 and an archive, or 1 and the program of one
for path in sorted((fixtures / "pickles").glob("*.*t")):
    if path.stat().st_size < 4000 and path.suffix in (".pt", ".ckpt"):
        seed("pickle", f"archive-{path.stem}", b"\0" + path.read_bytes())
        if path.stem in ("nested", "attack", "stretched", "deep", "bomb", "beyond"):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                seed("pickle", f"program-{path.stem}", b"\1" + archive.read(name))
