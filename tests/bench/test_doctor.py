"""What the doctor finds in untouched diffusers models, and how it says so."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastdiff.audit import Finding
from fastdiff.bench import doctor
from fastdiff.bench.doctor import audit_denoiser, audit_model
from fastdiff.errors import PlanMismatch
from fastdiff.families import family_of
from fastdiff.plan import TensorSpec
from tests.families.tiny_pipelines import PIPELINES, shared

UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "attention_head_dim": 8, "cross_attention_dim": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("UNet2DConditionModel", UNET),
    "SDXL": (
        "UNet2DConditionModel",
        UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
    ),
    "DiT": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "out_channels": 8,
            "num_layers": 1,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
    ),
    "SD3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
    ),
    "Flux": ("FluxTransformer2DModel", FLUX | {"pooled_projection_dim": 16, "guidance_embeds": True}),
    "Chroma": (
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
    ),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    cls, config = MODELS[name]
    return getattr(diffusers, cls)(**config).eval()


def lines(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """(kind, file, the source line)."""
    return [
        (one.kind, Path(one.file).name, Path(one.file).read_text().splitlines()[one.line - 1].strip())
        for one in findings
    ]


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "DiT", "SD3", "Flux"])
def test_these_models_can_be_captured_as_they_are(name: str) -> None:
    assert audit_model(built(name)) == []


def test_dit_in_training_drops_labels_at_random() -> None:
    ((kind, file, line),) = lines(audit_model(built("DiT").train()))
    assert (kind, file) == ("random draw", "embeddings.py")
    assert "torch.rand(labels.shape[0]" in line


def test_chroma_makes_its_guidance_on_the_host() -> None:
    (found,) = lines(audit_model(built("Chroma")))
    line = "guidance_proj = self.guidance_proj(torch.tensor([0] * batch_size)).to("
    assert found == ("host-to-device copy", "transformer_chroma.py", line)


def test_lumina_reads_its_text_lengths_and_copies_its_rotary_table() -> None:
    torch.manual_seed(0)
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(40, 32, 32), cap_feat_dim=16,
    ).eval()  # fmt: skip

    def denoiser(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        output: Tensor = model(sample, timestep, conditioning["text"], conditioning["mask"], return_dict=False)[0]
        return output

    conditioning = {"text": TensorSpec((8, 16), torch.float32), "mask": TensorSpec((8,), torch.int64)}
    found = lines(audit_denoiser(denoiser, model, (4, 8, 8), conditioning, torch.float32))
    assert found[:2] == [
        ("host read", "transformer_lumina2.py", "l_effective_cap_len = attention_mask.sum(dim=1).tolist()"),
        ("host-to-device copy", "transformer_lumina2.py", "freqs = self.freqs_cis[i].to(ids.device)"),
    ]
    assert {kind for kind, _, _ in found[2:]} == {"frozen scalar"}  # the lengths, wherever they are used


class Unknown(nn.Module):
    """Looks like a diffusers model, and wants what no config tells, or answers in another shape."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, channels, 1)
        self.dtype = torch.float32
        self.config = diffusers.configuration_utils.FrozenDict(in_channels=4, sample_size=8)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(sample),)


class Demanding(Unknown):
    def forward(self, sample: Tensor, timestep: Tensor, pose: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # type: ignore[override]
        return (self.layer(sample),)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Demanding(), "no pose can be made from its config; call fastdiff.audit.audit with a denoiser of your own"),
        (Unknown(channels=3), r"expected an output of \(4, 8, 8\) for each sample, got \(3, 8, 8\)"),
    ],
)
def test_a_model_that_cannot_be_called_says_why(model: nn.Module, expected: str) -> None:
    with pytest.raises(PlanMismatch, match=expected):
        audit_model(model)


def test_a_model_that_refuses_its_inputs_says_why() -> None:
    model = built("SDXL")
    model.config["addition_embed_type"] = None
    with pytest.raises(PlanMismatch, match="its forward refuses inputs made from its config"):
        audit_model(model)


def run(capsys: pytest.CaptureFixture[str], model: Path | None, as_json: bool = True) -> tuple[int, Any]:
    code = doctor.main(argparse.Namespace(model=model, json=as_json))
    printed = capsys.readouterr().out
    return code, json.loads(printed) if as_json else printed


def test_digits_can_be_captured_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, None, as_json=False)
    assert code == 0
    assert printed.splitlines() == [
        "Open to capture: the step of UNet2DConditionModel at any batch size, with the rows of DDIMScheduler."
    ]


def test_an_option_that_no_table_can_hold_is_a_finding(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "thresholding"
    folder.mkdir()
    for part in tiny_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    diffusers.DDIMScheduler(thresholding=True, clip_sample=False, steps_offset=1).save_pretrained(folder / "scheduler")
    code, report = run(capsys, folder)
    assert code == 1
    assert report["findings"] == []
    assert "thresholding" in report["not_linear"]
    assert report["capturable"].endswith("with another scheduler's rows, DDIMScheduler having none")
    code, printed = run(capsys, folder, as_json=False)
    assert code == 1
    assert "non-linear option" in printed


def test_a_pipeline_without_a_family_has_its_model_audited(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    code, report = run(capsys, tmp_path)
    assert code == 0
    assert report["step"] == "UNet2DModel"
    assert report["scheduler"] == "DDPMScheduler"


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_every_expert_is_looked_at(expert: str) -> None:
    pipe = PIPELINES["WanPipeline with two experts"]()
    assert doctor.examine(pipe, "wan")["findings"] == []
    coupled = getattr(pipe, expert).proj_out
    coupled.register_forward_hook(lambda module, given, output: output - output.mean(0, keepdim=True))
    report = doctor.examine(pipe, "wan")
    assert [finding["kind"] for finding in report["findings"]] == ["row coupling"]
    assert "at batch size 1 alone" in report["capturable"]


@pytest.mark.parametrize(
    ("name", "own", "small"),
    [
        ("WanPipeline", (4, 21, 60, 104), (4, 2, 16, 16)),
        ("QwenImagePipeline", (4096, 16), (256, 16)),
        ("StableDiffusionXLPipeline", (4, 16, 16), (4, 16, 16)),
        ("DiTPipeline", (4, 8, 8), (4, 8, 8)),  # which has no other
    ],
)
def test_large_images_are_looked_at_in_small(name: str, own: tuple[int, ...], small: tuple[int, ...]) -> None:
    pipe = shared(name)
    assert family_of(pipe).latent_shape == own
    assert doctor._small(pipe).latent_shape == small


def test_findings_are_a_table_with_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    findings = audit_model(built("Chroma"))
    doctor.print_report(doctor.report_of("chroma", "ChromaTransformer2DModel", "DDIMScheduler", findings, None))
    printed = capsys.readouterr().out
    assert f" diffusers/models/transformers/transformer_chroma.py:{findings[0].line} " in printed
    advice, capturable = printed.splitlines()[-2:]
    assert advice.startswith("host-to-device copy: a graph would copy again")
    assert capturable.startswith("Open to capture: nothing")


def test_row_coupling_leaves_batch_size_one() -> None:
    coupled = Finding("row coupling", "aten.mean.dim", "", "", 0, 1)
    report = doctor.report_of("model", "Model", "DDIMScheduler", [coupled], None)
    assert report["capturable"] == "the step of Model at batch size 1 alone, with the rows of DDIMScheduler"


def test_bad_arguments_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert parser.parse_args(["digits"]).model is None
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([str(tmp_path)])
    assert stopped.value.code == 2
    assert "expected a folder with a model_index.json" in capsys.readouterr().err
