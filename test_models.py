"""Everything is compared with something independent of it: published counts, numbers of the reference implementations on
hash-made weights (GOLDEN), naive formulas in float64, FlopCounterMode, brute force, and timm / transformers where they are
installed.

    pytest                                # all of it, without the speed comparisons
    pytest test_models.py -k speed -s     # prints seconds and ratios against transformers and timm; asserts nothing on time
"""
import io
import copy
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval
import flops
import layers
import models
from layers import UserError

torch.set_num_threads(2)
HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and images that are pure functions of names
# ---------------------------------------------------------------------------------------------------------------------

def uniform(name, shape):
    """Float64 numbers in [0, 1): splitmix64 of (crc32(name), position), the same on every platform."""
    with np.errstate(over="ignore"):
        z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(zlib.crc32(name.encode()) << 32)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) * 2.0 ** -53).reshape(tuple(shape))


def fill(key, shape):
    """The tensor that the reference runs had under this name."""
    u, last = uniform(key, shape), key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if last == "running_mean":
        value = 0.4 * u - 0.2
    elif last == "running_var":
        value = 0.5 + u
    elif "scale" in last or "gamma" in last:
        value = 0.5 + 0.5 * u
    elif len(shape) <= 1:
        value = 0.5 + u if last == "weight" else 0.2 * u - 0.1
    else:
        value = (2 * u - 1) * np.sqrt(3.0 / np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def signal(name, shape, scale=1.0):
    """Unit-variance uniform input, float32."""
    return torch.from_numpy(((2 * uniform(name, shape) - 1) * np.sqrt(3.0)).astype(np.float32)) * scale


def reference_state(module, rename):
    """A reference's state dict for our module: {their name: fill}, where rename(our key) -> their names (more: stacked)."""
    state = {}
    for key, target in module.state_dict().items():
        names = rename(key)
        for name in names:
            state[name] = fill(name, (target.shape[0] // len(names), *target.shape[1:]) if target.ndim else ())
    return state


def agree(got, expected, tolerance):
    """expected: (root mean square, flat indices, values) of a reference's tensor; tolerance: relative to that rms."""
    rms, index, values = expected
    got = got.detach().double().contiguous().flatten()
    assert abs(got.square().mean().sqrt().item() - rms) < tolerance * rms
    assert (got[index] - torch.tensor(values, dtype=torch.float64)).abs().max().item() < tolerance * rms


# ---------------------------------------------------------------------------------------------------------------------
# Golden numbers: whole networks
# ---------------------------------------------------------------------------------------------------------------------

# case: (model, task, format, (height, width), tolerance = 10 x the case's own float32 noise, {output: (rms, indices, values)})
GOLDEN = {
    "segformer_b0_seg_64x64": ("segformer_b0", "seg", "NVlabs segmentor", (64, 64), 6.8e-05, {
        "logits": (0.69989532, [3657, 10971, 18285, 25599, 32913], [-0.4414835, -0.7453992, 0.2392919, 0.1323144, 0.5288588]),
        "stage1": (0.95784977, [780, 2340, 3900, 5461, 7021], [0.5192968, -0.5641257, -0.2660059, -0.94763, -0.9306399]),
        "stage2": (1.0432916, [390, 1170, 1950, 2730, 3510], [-1.081163, -0.6453202, -0.813415, 0.07829117, 0.07810663]),
        "stage3": (1.0674226, [244, 731, 1219, 1706, 2193], [-0.05660157, 0.9173093, 0.4587319, -1.756346, 1.503224]),
        "stage4": (1.0169525, [97, 292, 487, 682, 877], [0.3658825, -0.4453821, 0.7661626, 0.06621733, 0.1221172])}),
    "segformer_b0_seg_97x130": ("segformer_b0", "seg", "NVlabs segmentor", (97, 130), 5.8e-05, {
        "logits": (0.77199507, [11786, 35357, 58928, 82499, 106071], [1.291005, -0.2166585, 0.5171655, 0.6075317, 0.3781718]),
        "stage1": (0.96809344, [2514, 7543, 12571, 17599, 22628], [0.5074996, -0.1528187, 0.3134143, -2.291454, 0.02235729]),
        "stage2": (1.0648839, [1347, 4041, 6735, 9429, 12123], [-1.273055, 0.5423767, -0.9064324, 0.2415332, 0.5918451]),
        "stage3": (1.0864111, [960, 2880, 4800, 6719, 8639], [0.06989602, -0.8879029, -0.4949543, 0.05695552, 1.093432]),
        "stage4": (1.027009, [488, 1463, 2438, 3413, 4388], [0.3442981, 1.283113, -1.185057, 1.44628, -0.05735546])}),
    "segformer_b0_cls_64x64": ("segformer_b0", "cls", "NVlabs encoder", (64, 64), 4.8e-05, {
        "logits": (0.87744391, [95, 285, 476, 666, 856], [-1.254445, 0.06108903, -0.8546538, 0.4678689, 2.076607])}),
    "segformer_b0-hf_seg_64x64": ("segformer_b0", "seg", "Hugging Face SegFormer", (64, 64), 4.7e-05, {
        "logits": (0.80971373, [3657, 10971, 18285, 25599, 32913], [-0.894213, -0.5666239, -1.765497, 0.4293145, 0.1311395]),
        "stage1": (1.1005031, [780, 2340, 3900, 5461, 7021], [0.9396052, -3.61763, 0.2501425, -0.3149104, 0.6447501]),
        "stage2": (1.008809, [390, 1170, 1950, 2730, 3510], [0.7177806, -0.866572, -1.367476, 0.5054114, -1.341909]),
        "stage3": (1.0920652, [244, 731, 1219, 1706, 2193], [-0.2329297, 0.3601953, 1.516792, 0.02435733, 0.9297465]),
        "stage4": (1.0280667, [97, 292, 487, 682, 877], [1.042809, -1.05251, -0.1017473, 0.4406271, 1.573808])}),
    "segformer_b0-hf_cls_64x64": ("segformer_b0", "cls", "Hugging Face SegFormer", (64, 64), 3.1e-05, {
        "logits": (0.91168471, [95, 285, 476, 666, 856], [0.2850929, -0.2065995, 1.071303, 1.042842, -1.022547])}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_networks(case):
    name, task, form, (height, width), tolerance, outputs = GOLDEN[case]
    model = models.build(name, task)
    form = next(f for f in models.FORMATS if f.name == form)
    report = models.load_pretrained(model, reference_state(model, form.rename))
    assert report.format == form.name and not report.missing and not report.unexpected
    assert report.loaded == [k for k in model.state_dict() if form.rename(k)]
    image = signal(f"image{height}x{width}", (1, 3, height, width))
    for net in (model.eval(), models.fuse(model)):
        with torch.inference_mode():
            maps = net.encoder(image)
            got = {f"stage{i + 1}": m for i, m in enumerate(maps)} | {"logits": net.head(maps)}
        for output, expected in outputs.items():
            agree(got[output], expected, tolerance)


# block cases: LayerNorm's eps shows only on small inputs, so these run at 1/32 of the scale
BLOCKS = {
    "segformer_attention-sr4_block_18x23": ((2, 64, 18, 23), 1.0, 1.8e-05, {
        "out": (0.40780112, [2523, 7570, 12617, 17664, 22710, 27757, 32804, 37851, 42897, 47944], [0.2125626, -0.009447723, 0.06426442, 0.3365477, 0.4122534, -0.3561883, -0.09330473, -0.5714193, 0.06720202, -0.6718014])}),
    "segformer_attention-sr4-eps_block_18x23": ((2, 64, 18, 23), 0.03125, 1.2e-05, {
        "out": (1.1739366, [2523, 7570, 12617, 17664, 22710, 27757, 32804, 37851, 42897, 47944], [2.530678, 0.2062835, -0.5134628, 0.5102714, 0.6534255, -0.1056852, 0.4035522, -1.458978, -0.03375112, -2.056553])}),
    "segformer_mixffn_block_9x11": ((2, 32, 9, 11), 1.0, 8.5e-06, {
        "out": (0.65929496, [302, 905, 1508, 2112, 2715, 3318, 3922, 4525, 5128, 5732], [-0.006661165, 0.9110826, 0.2022885, -0.08580193, -1.069699, 0.02927732, 0.4458055, 0.7520238, -1.633256, 1.77857])}),
    "segformer_patchembed-eps_block_30x41": ((2, 3, 30, 41), 0.03125, 1.8e-05, {
        "out": (1.0383099, [268, 804, 1341, 1877, 2413, 2950, 3486, 4022, 4558, 5095], [-0.6221203, -0.1520995, -0.5510803, 0.5330367, 0.5361275, 1.076542, 1.607653, -0.2919878, -0.3154262, 0.714198])}),
    "segformer_block-eps_block_18x23": ((2, 64, 18, 23), 0.03125, 3.3e-05, {
        "out": (0.78218287, [2523, 7570, 12617, 17664, 22710, 27757, 32804, 37851, 42897, 47944], [-0.6152951, 0.9668776, -0.5408797, 0.3273408, 0.1019047, -0.2619177, 0.9811216, -0.5435123, -0.4999261, -1.221699])}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_golden_segformer_blocks(case):
    shape, scale, tolerance, outputs = BLOCKS[case]
    norm = lambda dim: layers.LayerNorm2d(dim, eps=1e-6)
    if "attention" in case:
        module, keys = layers.ATTENTION["sra"](64, 2, 4, 0), {"": "attn."}
    elif "mixffn" in case:
        module, keys = layers.FFN["mix"](32, 4), {"dwconv.": "mlp.dwconv.dwconv.", "": "mlp."}
    elif "patchembed" in case:
        module, keys = layers.EMBED["overlap"](3, 32, 4, layers.LayerNorm2d), {"conv.": "patch_embed1.proj.", "": "patch_embed1."}
    else:
        skip = layers.SKIP["pre"]
        module = layers.Block(skip(layers.ATTENTION["sra"](64, 2, 4, 0), 64, norm, 0), skip(layers.FFN["mix"](64, 4), 64, norm, 0))
        keys = {"attn.norm.": "norm1.", "ffn.norm.": "norm2.", "attn.branch.": "attn.", "ffn.branch.dwconv.": "mlp.dwconv.dwconv.",
                "ffn.branch.": "mlp."}
    rename = lambda key: [next(theirs + key[len(ours):] for ours, theirs in keys.items() if key.startswith(ours))]
    state = reference_state(module, rename)
    module.load_state_dict({key: state[rename(key)[0]].view_as(value) for key, value in module.state_dict().items()})
    agree(module.eval()(signal("x", shape, scale)), outputs["out"], tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Models: counts, slots, sizes
# ---------------------------------------------------------------------------------------------------------------------

PARAMETERS = {      # seg (150 classes), cls (1000): the released networks without their dead layers
    "segformer_b0": (3_752_694, 3_576_392), "segformer_b1": (13_715_798, 13_664_424), "segformer_b2": (27_461_974, 24_709_288),
    "segformer_b3": (47_337_814, 44_585_128), "segformer_b4": (64_108_374, 61_355_688), "segformer_b5": (84_708_694, 81_956_008),
}


def parameters(name, task="seg", **slots):
    with torch.device("meta"):
        return sum(p.numel() for p in models.build(name, task, **slots).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert (parameters(name, "seg"), parameters(name, "cls")) == PARAMETERS[name]


@pytest.mark.parametrize("slots, words", [
    ({"attn": "nonsense"}, ["--attn 'nonsense'", "sra"]), ({"head": "mlp,mlp"}, ["--head", "one word"]),
    ({"attn": "sra,sra"}, ["--attn", "four"]), ({"colour": "red"}, ["colour", "embed"])])
def test_unknown_words_list_the_known(slots, words):
    with pytest.raises(UserError) as error:
        models.build("segformer_b0", **slots)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="segformer_b0, segformer_b1"):
        models.build("segformer_b9")


def test_initialisation_is_the_original_one():
    torch.manual_seed(0)
    model = models.build("segformer_b1")
    std = {k: v.std().item() for k, v in model.state_dict().items() if k.endswith("weight") and v.ndim == 4}
    for key, value in std.items():
        weight = model.state_dict()[key]
        fan_out = weight.shape[0] * weight[0, 0].numel() // (weight.shape[0] if "dwconv" in key else 1)
        if key.startswith("encoder"):
            expected = 0.02 if weight.shape[2] == 1 else (2 / fan_out) ** 0.5
        elif "fuse" in key:
            expected = (2 / fan_out) ** 0.5
        else:
            expected = (1 / 3 / weight.shape[1]) ** 0.5             # PyTorch's default: uniform ± 1 / sqrt(fan_in)
        assert value == pytest.approx(expected, rel=0.1), key
    assert all((v == 0).all() for k, v in model.state_dict().items() if k.startswith("encoder") and k.endswith("bias"))


def test_heads_of_one_function_agree_in_value_and_gradient():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        fast = layers.HEAD["mlp"]((8, 16, 24, 32), 5, 12, None).to(dtype)
        literal = layers.HEAD["mlp_concat"]((8, 16, 24, 32), 5, 12, None).to(dtype)
        literal.load_state_dict(fast.state_dict())
        maps = [torch.randn(2, d, h, w, dtype=dtype, requires_grad=True)
                for d, h, w in ((8, 25, 33), (16, 13, 17), (24, 7, 9), (32, 4, 5))]
        results = []
        for head in (fast, literal):
            out = head.eval()(maps)         # in training BatchNorm takes the projections' biases away: gradients of pure noise
            grads = torch.autograd.grad(out.square().sum(), [*maps, *head.parameters()])
            results.append([out, *grads])
        for a, b in zip(*results):
            assert (a - b).abs().max() <= tolerance * b.square().mean().sqrt()


@pytest.mark.parametrize("batch, classes, low, high", [(2, 150, (16, 16), (64, 64)), (1, 5, (9, 13), (33, 57)), (2, 7, (1, 3), (5, 8)),
                                                       (1, 4, (8, 8), (4, 5)), (2, 3, (25, 33), (97, 130))])
@pytest.mark.parametrize("strip", [2 ** 20, 3000])
def test_upsampled_cross_entropy(monkeypatch, batch, classes, low, high, strip):
    monkeypatch.setattr(layers, "STRIP", strip)
    torch.manual_seed(0)
    logits = torch.randn(batch, classes, *low, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (batch, *high))
    labels[torch.rand(batch, *high) < 0.3] = 255
    loss = layers.UpsampledCrossEntropy()(logits, labels.to(torch.uint8))
    full = F.interpolate(logits, high, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, labels, ignore_index=255)
    grad, = torch.autograd.grad(3 * loss, logits)
    expected_grad, = torch.autograd.grad(3 * expected, logits)
    assert (loss - expected).abs() < 1e-12 and (grad - expected_grad).abs().max() < 1e-10 * expected_grad.abs().max()
    assert torch.equal(layers.upsampled_argmax([logits], high), full.argmax(1))
    half = layers.UpsampledCrossEntropy()(logits, labels, count=2 * (labels != 255).sum())
    assert half.item() == pytest.approx(loss.item() / 2)


def test_upsampled_cross_entropy_with_nothing_labelled():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = layers.UpsampledCrossEntropy()(logits, torch.full((1, 9, 9), 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_upsampled_argmax_of_several_views_is_the_mean_soft_max():
    torch.manual_seed(0)
    views = [torch.randn(1, 6, 8, 9, dtype=torch.float64), torch.randn(1, 6, 16, 5, dtype=torch.float64)]
    mean = sum(F.interpolate(v, (31, 37), mode="bilinear").softmax(1) for v in views)
    assert torch.equal(layers.upsampled_argmax(views, (31, 37)), mean.argmax(1))


def test_smallest_image_is_named():
    model = models.build("segformer_b0", num_classes=2).eval()
    assert model.encoder.smallest == 29
    model(torch.zeros(1, 3, 29, 29))
    with pytest.raises(UserError, match="at least 29"):
        model(torch.zeros(1, 3, 28, 64))


@pytest.mark.parametrize("name", ["segformer_b0"])
def test_fuse_gives_the_same_outputs(name):
    torch.manual_seed(0)
    model = models.build(name, num_classes=7)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5), torch.nn.init.normal_(m.bias)
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 1.5)
    model.eval()
    fused = models.fuse(model)
    x = torch.randn(2, 3, 65, 97)
    a, b = model(x), fused(x)
    assert (a - b).abs().max() < 1e-5 * a.square().mean().sqrt().clamp(min=1)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.head.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) and not fused.training


# ---------------------------------------------------------------------------------------------------------------------
# Weights from files
# ---------------------------------------------------------------------------------------------------------------------

def safetensors_bytes(state, header=None, tail=b""):
    """The format written naively: length, JSON header, raw bytes."""
    entries, data = {}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().numpy().tobytes()
        entries[name] = {"dtype": {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(entries if header is None else header(entries)).encode()
    return struct.pack("<Q", len(head)) + head + data + tail


def hub_state(task="seg"):
    model = models.build("segformer_b0", task, num_classes=5)
    form = next(f for f in models.FORMATS if f.name == "Hugging Face SegFormer")
    return reference_state(model, form.rename)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_directories(tmp_path, file):
    state = hub_state()
    if file.endswith("bin"):
        torch.save(state, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(safetensors_bytes(state))
    (tmp_path / "config.json").write_text("{}")
    model = models.build("segformer_b0", num_classes=5)
    report = models.load_pretrained(model, tmp_path)
    assert report.format == "Hugging Face SegFormer" and len(report.loaded) == len(model.state_dict()) and not report.fresh
    query = state["segformer.encoder.block.1.0.attention.self.value.weight"]
    assert torch.equal(model.encoder.stages[1].blocks[0].attn.branch.kv.weight[64:], query)


def test_nothing_is_loaded_silently(tmp_path):
    donor = models.build("segformer_b0", num_classes=5)
    path = tmp_path / "donor.pt"
    models.save_checkpoint(path, {"spec": models.describe(donor), "model": donor.state_dict(), "ema": None})
    model = models.build("segformer_b0", num_classes=7)
    report = models.load_pretrained(model, path)                                # another class count
    assert report.fresh == ["head.classifier.weight", "head.classifier.bias"] and not report.missing
    model = models.build("segformer_b0", head="mlp", task="cls", num_classes=3)
    report = models.load_pretrained(model, path)                                # another task: its head is new
    assert report.fresh == ["head.fc.weight", "head.fc.bias"] and len(report.unexpected) == 15
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="looks like segformer_b0"):
        models.load_pretrained(models.build("segformer_b1"), path)
    lame = {k: v for k, v in donor.state_dict().items() if "stages.2.blocks.1.ffn.branch.fc1" not in k}
    with pytest.raises(UserError, match="2 missing"):
        models.load_pretrained(model, lame)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())        # a refused file changes nothing
    with pytest.raises(UserError, match="none of its"):
        models.load_pretrained(model, {"stranger.weight": torch.zeros(3)})
    original = reference_state(donor, models.FORMATS[1].rename) | {"decode_head.conv_seg.weight": torch.zeros(5, 128, 1, 1)}
    report = models.load_pretrained(donor, {"meta": {}, "state_dict": original})
    assert report.format == "NVlabs segmentor" and not report.unexpected        # the dead layer is known as such


def test_checkpoints_round_trip_and_are_atomic(tmp_path, monkeypatch):
    model = models.build("segformer_b0", num_classes=3, attn="sra", head="mlp_concat")
    path = tmp_path / "last.pt"
    models.save_checkpoint(path, {"spec": models.describe(model), "model": model.state_dict(), "ema": None, "epoch": 3})
    again = models.restore(models.read_checkpoint(path))
    assert str(again.spec) == "segformer_b0-head=mlp_concat" and again.num_classes == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    content = path.read_bytes()
    monkeypatch.setattr(models.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        models.save_checkpoint(path, {"spec": 1, "model": 2})
    assert path.read_bytes() == content


class Bomb:
    def __reduce__(self):
        return (print, ("code was run",))


def test_hostile_checkpoints_are_refused_in_one_line(tmp_path, capsys):
    def refused(path, reason):
        with pytest.raises(UserError) as error:
            models.read_weights(path)
        assert reason in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)

    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(1000.)}, path)
    good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    refused(path, "truncated")
    path.write_bytes(b"")
    refused(path, "truncated")
    flipped = bytearray(good)
    flipped[good.index(torch.arange(1000.).numpy().tobytes()[400:440])] ^= 1
    path.write_bytes(flipped)
    refused(path, "check sum")
    torch.save({"a": Bomb()}, path)
    refused(path, "run code")
    torch.save({"a": torch.zeros(1).expand(10 ** 12)}, path)
    refused(path, "claims more elements")
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    refused(path, "compressed")
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "neither")
    torch.save([1, 2], path)
    refused(path, "no state dict")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("change, reason", [
    (lambda e: e["b"].update(data_offsets=[0, 16]) or e, "overlap"),                       # overlapping
    (lambda e: e["b"].update(data_offsets=[20, 36]) or e, "overlap"),                      # a hole
    (lambda e: e["b"].update(data_offsets=[16, 10 ** 12]) or e, "out of range"),
    (lambda e: e["b"].update(data_offsets=[-4, 12]) or e, "out of range"),
    (lambda e: e["b"].update(shape=[5]) or e, "fit"),
    (lambda e: e["b"].update(shape=[2 ** 40, 2 ** 40]) or e, "out of range"),
    (lambda e: e["b"].update(shape=[True, 4]) or e, "out of range"),
    (lambda e: e["b"].update(dtype="F128") or e, "dtype"),
    (lambda e: e["b"].pop("shape") and e, "lacks"),
    (lambda e: [1, 2], "table"),
])
def test_hostile_safetensors_are_refused(tmp_path, change, reason):
    path = tmp_path / "x.safetensors"
    state = {"a": torch.arange(4.), "b": torch.arange(4.) + 4}
    path.write_bytes(safetensors_bytes(state))
    assert all(torch.equal(v, state[k]) for k, v in models.read_safetensors(path).items())
    path.write_bytes(safetensors_bytes(state, change))
    with pytest.raises(UserError, match=reason):
        models.read_safetensors(path)


def test_hostile_safetensors_lengths(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = safetensors_bytes({"a": torch.arange(4.)})
    for content, reason in ((whole[:-1], "fit"), (whole + b"x", "behind"), (struct.pack("<Q", 2 ** 31) + whole[8:], "claims a header"),
                            (whole[:5], "claims"), (b"", "claims"), (struct.pack("<Q", 20) + b"{" * 60, "JSON")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            models.read_safetensors(path)


def test_parameter_groups():
    model = models.build("segformer_b0", num_classes=3)
    groups = models.parameter_groups(model, 1e-3, 0.05)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["lr"] == pytest.approx(1e-2 if name.startswith("head.") else 1e-3)
            assert (group["weight_decay"] == 0) == (name.endswith("bias") or "norm" in name)


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers, where it is installed
# ---------------------------------------------------------------------------------------------------------------------

def hub_segformer(index, num_classes=150):
    transformers = pytest.importorskip("transformers")
    size = models.SIZES[f"mit_b{index}"]
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        depths=list(size.depths), hidden_sizes=list(size.dims), decoder_hidden_size=size.width, num_labels=num_classes))


def test_equals_transformers_through_a_saved_directory(tmp_path):
    torch.manual_seed(0)
    theirs = hub_segformer(0, 21).eval()
    for m in theirs.modules():
        if isinstance(m, torch.nn.LayerNorm):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5), torch.nn.init.normal_(m.bias, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = models.build("segformer_b0", num_classes=21).eval()
    report = models.load_pretrained(ours, tmp_path)
    assert report.format == "Hugging Face SegFormer" and not report.fresh and not report.unexpected
    for m in ours.encoder.modules():
        if isinstance(m, torch.nn.LayerNorm):
            m.eps = 1e-5                                # transformers ignores its config's layer_norm_eps
    x = torch.randn(1, 3, 97, 130)
    with torch.inference_mode():
        a, b = ours(x), theirs(pixel_values=x).logits
    assert (a - b).abs().max() < 1e-5 * b.square().mean().sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------

def flop_counter_macs(model, size):
    """FlopCounterMode / 2 on the meta device, where it knows every attention kernel."""
    from torch.utils.flop_counter import FlopCounterMode
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, *size, device="meta"))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def on_meta(name, task="seg", **slots):
    with torch.device("meta"):
        return models.build(name, task, **slots)


@pytest.mark.parametrize("task", models.CLASSES)
@pytest.mark.parametrize("name", models.MODELS)
def test_count_equals_flop_counter_mode(name, task):
    model = on_meta(name, task)
    for size in ((256, 256), (97, 130)):
        assert flops.count(model, size).macs == flop_counter_macs(model, size)
    assert flops.count(model, (64, 64)).params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("slot, word", [(slot, word) for slot, words in models.SLOTS.items() for word in words])
def test_count_of_every_word(slot, word):
    model = on_meta("segformer_b0", **{slot: word})
    assert flops.count(model, (97, 130)).macs == flop_counter_macs(model, (97, 130))


def test_exact_counts_of_segformer_b2():
    assert flops.count(on_meta("segformer_b2", head="mlp_concat")).macs == 62_337_843_200
    assert flops.count(on_meta("segformer_b2")).macs == 24_287_117_312
    assert flops.count(models.fuse(on_meta("segformer_b2"))).macs == 23_683_137_536
    published = {0: 8_387_821_568, 1: 15_878_062_080, 3: 78_963_015_680, 4: 95_567_478_784, 5: 111_510_290_432}
    for index, macs in published.items():
        assert flops.count(on_meta(f"segformer_b{index}", head="mlp_concat")).macs == macs


def loop_macs(out_shape, dot_length):
    """Multiply-adds of a convolution or product, one scalar product at a time."""
    total = 0
    for _ in np.ndindex(*out_shape):
        for _ in range(dot_length):
            total += 1
    return total


@pytest.mark.parametrize("module, shape, dot", [
    (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 7, 5), 4 * 9), (torch.nn.Conv2d(4, 8, (1, 3), groups=4), (2, 4, 5, 5), 3),
    (torch.nn.Linear(5, 3), (2, 7, 5), 5)])
def test_formulas_against_a_loop(module, shape, dot):
    x = torch.randn(shape)
    out = module(x)
    formula = next(flops.MACS[c] for c in type(module).__mro__ if c in flops.MACS)
    assert formula(module, (x,), out) == loop_macs(out.shape, dot)


def test_formulas_of_products():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert flops.MACS[layers.MatMul](None, (a, b), a @ b) == loop_macs((2, 3, 5), 4)
    q, k, v = torch.randn(1, 2, 6, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 4)
    assert flops.MACS[layers.Attend](None, (q, k, v), layers.Attend()(q, k, v)) == loop_macs((2, 6, 5), 3) + loop_macs((2, 6, 4), 5)


def test_counting_leaves_no_trace():
    model = models.build("segformer_b0", num_classes=3)
    model.train()
    model.encoder.stages[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    first, second = flops.count(model, (64, 64)), flops.count(model, (64, 64))
    assert first == second and sum(r["macs"] for r in first.rows) == first.macs and sum(r["params"] for r in first.rows) == first.params
    assert {p: m for p, (_, m) in first.by_part().items()} == {
        p: sum(r["macs"] for r in first.rows if r["part"] == p) for p in first.by_part()}
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    model.head.act = torch.nn.Softplus()
    with pytest.raises(UserError, match="Softplus"):
        flops.count(model, (64, 64))
    assert not any(m._forward_hooks for m in model.modules())


def run(script, *arguments, **more):
    """A script as a user starts it -> (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)
    return done.returncode, done.stdout, done.stderr


def one_line_error(result, *words):
    status, _, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_flops_command(tmp_path):
    status, out, _ = run("flops.py", "--model", "segformer_b2", "--head", "mlp_concat", "--json", tmp_path / "a.json")
    table = json.loads((tmp_path / "a.json").read_text())
    assert status == 0 and table["macs"] == 62_337_843_200 and table["params"] == 27_461_974 and "62,337,843,200" in out
    status, out, _ = run("flops.py", "--model", "segformer_b0", "--size", "64x96", "--json", "-")
    assert json.loads(out)["size"] == [64, 96]
    one_line_error(run("flops.py", "--model", "segformer_b99"), "segformer_b99", "segformer_b0")
    one_line_error(run("flops.py", "--attn", "magic"), "--attn", "magic", "sra")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def test_confusion_matrix_against_brute_force():
    torch.manual_seed(0)
    label, pred = torch.randint(0, 5, (3, 17, 19)), torch.randint(0, 4, (3, 17, 19))
    label[label == 4] = 255                             # class 4 is nowhere; 3 is confused with all
    matrix = eval.ConfusionMatrix(5)
    for l, p in zip(label, pred):
        matrix.update(p, l)
    for k in range(5):
        inside = sum(1 for l, p in zip(label.flatten().tolist(), pred.flatten().tolist()) if l == p == k)
        union = sum(1 for l, p in zip(label.flatten().tolist(), pred.flatten().tolist()) if l != 255 and k in (l, p))
        total = (label == k).sum().item()
        iou, accuracy = matrix.iou()[k].item(), matrix.accuracy()[k].item()
        assert np.isnan(iou) and np.isnan(accuracy) if k == 4 else (iou, accuracy) == pytest.approx((inside / union, inside / total))
    assert matrix.summary()["mIoU"] == pytest.approx(100 * matrix.iou()[:4].mean().item())
    assert matrix.counts.dtype == torch.int64 and matrix.counts.sum() == (label != 255).sum()
    matrix.counts += 2 ** 40                            # far beyond what float32 can count
    before = matrix.counts.sum()
    matrix.update(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert matrix.counts.sum() == before + 1


class Pairs:
    """Images of several sizes with labels, as a data set."""
    num_classes, seed = 4, 0

    def __init__(self):
        rng = np.random.default_rng(0)
        sizes = [(40, 56), (64, 48), (40, 56), (33, 91), (40, 56)]
        self.items = [(torch.from_numpy(rng.integers(0, 256, (3, *s), dtype=np.uint8)), torch.from_numpy(rng.integers(0, 4, s)), str(s))
                      for s in sizes]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return models.build("segformer_b0", num_classes=4).eval()


@pytest.mark.parametrize("protocol", [{}, {"size_divisor": 32}, {"scales": (0.75, 1.5), "flip": True}, {"slide": (32, 20)}])
def test_evaluation_does_not_depend_on_batch_or_ranks(small_model, protocol):
    whole = eval.evaluate_seg(small_model, Pairs(), data.Processes(), 1, 0, short_side=40, **protocol)
    batched = eval.evaluate_seg(small_model, Pairs(), data.Processes(), 3, 0, short_side=40, **protocol)
    ranks = [eval.evaluate_seg(small_model, Pairs(), data.Processes(rank=r, world=2), 1, 0, short_side=40, **protocol) for r in (0, 1)]
    assert (whole.counts - batched.counts).abs().sum() <= 4         # rounding of another kernel may flip a near-tie
    assert torch.equal(whole.counts, ranks[0].counts + ranks[1].counts)
    assert whole.counts.sum() == sum(labels.numel() for _, labels, _ in Pairs().items)


def test_protocol_against_the_plain_computation():
    torch.manual_seed(0)
    model = models.build("segformer_b0", num_classes=4).double().eval()
    image = Pairs()[3][0]
    normalised = lambda x: ((x.double() / 255 - data.MEAN) / data.STD)[None]
    original = data.normalise
    with pytest.MonkeyPatch.context() as patch:                     # float64 through and through
        patch.setattr(data, "normalise", lambda x: original(x).double())
        got = eval.predict(model, image, (33, 91), "cpu", scales=(1.0, 2.0), flip=True)
        mean = 0
        for size in ((33, 91), (66, 182)):
            x = normalised(eval.TF.resize(image, size, antialias=True))
            for flip in (False, True):
                logits = model(x.flip(-1) if flip else x)
                full = F.interpolate(logits, (33, 91), mode="bilinear")
                mean = mean + (full.flip(-1) if flip else full).softmax(1)
        assert (got == mean.argmax(1)[0]).double().mean() > 0.999   # the float32 normalisation may flip a near-tie
        got = eval.predict(model, image, (33, 91), "cpu", slide=(32, 24))
        total, times = torch.zeros(1, 4, 33, 91, dtype=torch.float64), torch.zeros(33, 91)
        for y in (0, 1):
            for x in (0, 24, 48, 59):
                part = normalised(image)[:, :, y:y + 32, x:x + 32]
                total[:, :, y:y + 32, x:x + 32] += F.interpolate(model(part), (32, 32), mode="bilinear")
                times[y:y + 32, x:x + 32] += 1
        assert (got == (total / times).argmax(1)[0]).double().mean() > 0.999


@pytest.mark.parametrize("size, short, scale, divisor, expected", [
    ((512, 683), 512, 1, None, [512, 683]), ((100, 1000), 512, 1, None, [205, 2048]), ((600, 400), 512, 1, 32, [768, 512]),
    ((375, 500), 512, 0.5, 32, [256, 352]), ((375, 500), None, 1, None, [375, 500])])
def test_input_size(size, short, scale, divisor, expected):
    assert eval.input_size(size, short, scale, divisor) == expected


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """A tiny data set in ADE20K's layout with a checkpoint that fits it, and one that does not."""
    root = tmp_path_factory.mktemp("street")
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)).save(root / "images" / split / f"{i}.png")
            Image.fromarray(rng.integers(0, 5, (40, 50 + i), dtype=np.uint8)).save(root / "annotations" / split / f"{i}.png")
    (root / "id2label.json").write_text(json.dumps({str(k): name for k, name in enumerate(["sky", "road", "tree", "car"])}))
    for name, classes in (("good.pt", 4), ("other.pt", 9)):
        model = models.build("segformer_b0", num_classes=classes)
        models.save_checkpoint(root / name, {
            "spec": models.describe(model), "model": model.state_dict(), "ema": None, "classes": ["sky", "road", "tree", "car"],
            "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
            "args": {"crop": 40, "zero_is_class": False, "data_path": "street"}})
    return root


def test_eval_command_prints_and_writes_the_same(street, tmp_path):
    status, out, err = run("eval.py", "--checkpoint", street / "good.pt", "--data-path", street, "--json", tmp_path / "r.json")
    assert status == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    for name in ("aAcc", "mIoU", "mAcc"):
        assert f"{name} {result[name]:.2f} %" in out
    for name, figures in result["classes"].items():
        assert f"{name:<28}{figures['IoU']:8.2f}{figures['Acc']:8.2f}" in out
    assert result["short_side"] == 40 and result["images"] == 3


def test_eval_draws_images(street, tmp_path):
    status, out, err = run("eval.py", "--checkpoint", street / "good.pt", "--images", street / "images" / "validation", "--save-dir", tmp_path)
    assert status == 0, err
    label = Image.open(tmp_path / "1.png")
    ids = np.array(label)
    assert label.mode == "P" and ids.shape == (40, 51) and ids.min() >= 1 and ids.max() <= 4     # the ids of the data set's masks
    assert label.getpalette()[3:15] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert Image.open(tmp_path / "1_overlay.png").size[0] >= 200


def test_eval_mistakes_are_one_line(street, tmp_path):
    one_line_error(run("eval.py", "--checkpoint", tmp_path / "no.pt"), "no.pt", "no such file")
    one_line_error(run("eval.py", "--checkpoint", street / "other.pt", "--data-path", street), "4 classes", "9")
    one_line_error(run("eval.py"), "--checkpoint", "--pretrain")
    one_line_error(run("eval.py", "--checkpoint", street / "good.pt", "--data-path", tmp_path / "none"), "none")
    one_line_error(run("eval.py", "--model", "segformer_b1", "--pretrain", street / "good.pt"), "segformer_b0")


# ---------------------------------------------------------------------------------------------------------------------
# Speed: on demand, never an assertion
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def on_demand(request):
    if "speed" not in request.config.option.keyword:
        pytest.skip("on demand: pytest test_models.py -k speed -s")


def alternate(ours, theirs, rounds):
    """Median seconds of two functions run in turn, so that both see the same machine."""
    times = ([], [])
    for i in range(rounds + 1):
        for f, seconds in zip((ours, theirs), times):
            start = time.perf_counter()
            f()
            seconds.append(time.perf_counter() - start)
    return [sorted(seconds[1:])[rounds // 2] for seconds in times]


@pytest.mark.parametrize("index, batch", [(0, 2), (2, 1)])
def test_speed_of_segformer(on_demand, index, batch):
    """One training step (forward, loss at full resolution, backward) and inference, 512 x 512, 150 classes, float32."""
    theirs = hub_segformer(index).train()
    ours = models.build(f"segformer_b{index}").to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, 512, 512)
    labels = torch.randint(0, 150, (batch, 512, 512))
    mine = x.to(memory_format=torch.channels_last)
    loss = layers.UpsampledCrossEntropy()
    a, b = alternate(lambda: loss(ours(mine), labels).backward(), lambda: theirs(pixel_values=x, labels=labels).loss.backward(), 7)
    print(f"\nsegformer_b{index} training step, batch {batch}: {a:.3f} s, transformers {b:.3f} s, {b / a:.2f} x as fast")
    fused, theirs = models.fuse(ours), theirs.eval()
    with torch.inference_mode():
        for n in (1, batch):
            a, b = alternate(lambda: fused(mine[:n]), lambda: theirs(pixel_values=x[:n]).logits, 11)
            print(f"segformer_b{index} inference, batch {n}: {a:.3f} s, transformers {b:.3f} s, {b / a:.2f} x as fast")


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {here!r})
import layers, models, test_models
x, labels = torch.randn(8, 3, 512, 512), torch.randint(0, 150, (8, 512, 512))
if {ours}:
    model = models.build("segformer_b0").to(memory_format=torch.channels_last).train()
    layers.UpsampledCrossEntropy()(model(x.to(memory_format=torch.channels_last)), labels).backward()
else:
    test_models.hub_segformer(0).train()(pixel_values=x, labels=labels).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_speed_memory_of_a_training_step(on_demand):
    """Peak resident memory of one SegFormer-B0 step at batch 8, a fresh process each."""
    pytest.importorskip("transformers")
    here = os.path.dirname(os.path.abspath(__file__))
    peak = [int(subprocess.run([sys.executable, "-c", MEMORY.format(here=here, ours=ours)], capture_output=True, text=True,
                               check=True).stdout.split()[-1]) / 2 ** 20 for ours in (True, False)]
    print(f"\nsegformer_b0 step, batch 8: peak {peak[0]:.2f} GiB, transformers {peak[1]:.2f} GiB, {peak[0] / peak[1]:.2f} of it")
