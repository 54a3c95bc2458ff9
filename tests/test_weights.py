"""What a graph reads by address or has baked in, changed in every way that a user changes a model."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fastdiff.weights import Settings, Weights


class LoraLinear(nn.Module):
    """A wrapped layer with its scale in a dict, as peft keeps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora = nn.ModuleDict({"default": nn.Linear(base.in_features, base.out_features, bias=False)})
        self.scaling = {"default": 1.0}
        self.active_adapters = ["default"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        for name in self.active_adapters:
            out = out + self.scaling[name] * self.lora[name](x)
        return out


class Processor:
    """An attention processor: a plain object with numbers of its own, as IP-Adapter's."""

    def __init__(self) -> None:
        self.scale: list[Any] = [0.5]

    def __call__(self, attention: Any, x: Tensor, **others: Any) -> Tensor:
        return x


@pytest.fixture
def model(pipe: Any) -> Any:
    unet = copy.deepcopy(pipe.unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = LoraLinear(attention.to_q)
    attention.processor = Processor()
    unet.cache, unet.scales, unet.named = [1.0, 2.0], [[1.0, 0.5], [0.5]], OrderedDict(first=1.0)
    return unet


def _attention(model: Any) -> Any:
    return model.mid_block.attentions[0].transformer_blocks[0].attn1


def _replace_weight(model: Any) -> None:
    model.conv_in.weight = nn.Parameter(model.conv_in.weight.clone())


def _cast(model: Any) -> None:
    model.to(torch.bfloat16)


def _wrap(model: Any) -> None:
    _attention(model).to_k = LoraLinear(_attention(model).to_k)


def _unwrap(model: Any) -> None:
    _attention(model).to_q = _attention(model).to_q.base_layer


def _rescale(model: Any) -> None:
    _attention(model).to_q.scaling["default"] = 0.3


def _disable(model: Any) -> None:
    _attention(model).to_q.active_adapters.clear()


def _processor(model: Any) -> None:
    _attention(model).processor = Processor()


def _processor_scale(model: Any) -> None:
    _attention(model).processor.scale[0] = 0.9


def _hook(model: Any) -> None:
    model.conv_in.register_forward_hook(lambda module, inputs, output: output)


def _training(model: Any) -> None:
    model.train()


def _buffer(model: Any) -> None:
    model.register_buffer("shift", torch.zeros(3))


def _attribute(model: Any) -> None:
    model.conv_in.extra_scale = 2.0


def _list(model: Any) -> None:
    model.cache[1] = 3.0


def _nested_list(model: Any) -> None:
    model.scales[1][0] = 3.0


def _ordered(model: Any) -> None:
    model.named["first"] = 3.0


def _class(model: Any) -> None:
    model.conv_in.__class__ = type("Patched", (type(model.conv_in),), {})


def _other_memory(model: Any) -> None:
    model.conv_in.weight.data = model.conv_in.weight.data.clone()


CHANGES: dict[Callable[[Any], None], str] = {
    _replace_weight: "conv_in._parameters",
    _cast: "moved, resized or cast",
    _wrap: "attn1._modules",
    _unwrap: "attn1._modules",
    _rescale: r"scaling\['default'\] was 1.0, is 0.3",
    _disable: r"active_adapters was \['default'\], is \[\]",
    _processor: "processor was another Processor",
    _processor_scale: r"processor.scale was \[0.5\], is \[0.9\]",
    _hook: "conv_in._forward_hooks has 1 entries, had 0",
    _training: "training was False, is True",
    _buffer: "_buffers has 1 entries, had 0",
    _attribute: "conv_in has",
    _list: r"cache was \[1.0, 2.0\], is \[1.0, 3.0\]",
    _nested_list: r"scales was \[\[1.0, 0.5\], \[0.5\]\], is \[\[1.0, 0.5\], \[3.0\]\]",
    _ordered: r"named\['first'\] was 1.0, is 3.0",
    _class: "conv_in was a Conv2d, is a Patched",
    _other_memory: "moved, resized or cast",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_graph_would_not_see_is_named(model: Any, change: Callable[[Any], None]) -> None:
    weights = Weights(model)
    assert weights.changed() is None
    change(model)
    found = weights.changed()
    assert found is not None
    assert re.search(CHANGES[change], found), found


def test_values_written_in_place_and_use_are_no_change(model: Any) -> None:
    weights = Weights(model)
    with torch.no_grad():
        model.conv_in.weight.mul_(1.1)
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # copies into the tensors that are there
        model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 16, 64))
    assert weights.changed() is None


def test_no_model_is_never_stale() -> None:
    assert Weights(None).changed() is None


def test_a_scale_that_was_multiplied_and_divided_again_is_no_change(model: Any) -> None:
    scaling = _attention(model).to_q.scaling
    scaling["default"] = 0.9
    weights = Weights(model)
    scaling["default"] = 0.9 * 0.3 / 0.3
    assert scaling["default"] != 0.9
    assert weights.changed() is None
    scaling["default"] = 0.9001
    assert weights.changed()


# Settings


@pytest.fixture
def adapted(pipe: Any) -> Any:
    unet = copy.deepcopy(pipe.unet)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
        unet.add_adapter(config, name)
    unet.set_adapters(["one"], [0.9])
    _attention(unet).processor = processor = Processor()
    processor.scale += [[0.1, 0.2]]
    return unet


def _nested_scale(model: Any) -> None:
    _attention(model).processor.scale[1][0] = 0.3


SETTINGS: list[Callable[[Any], None]] = [
    _processor_scale,
    _nested_scale,
    lambda model: model.set_adapters(["one"], [1.2]),
    lambda model: model.set_adapters(["two"], [1.1]),
    lambda model: model.set_adapters(["two", "one"], [1.1, 1.1]),
    lambda model: model.disable_adapters(),
]


def test_settings_are_told_apart_and_left_to_whoever_looks_at_them(adapted: Any) -> None:
    settings = Settings(adapted)
    weights = Weights(adapted, settings)
    seen = [settings.now()]  # and what they name by id
    for change in SETTINGS:
        change(adapted)
        seen.append(settings.now())
        assert weights.changed() is None
    for change in (_processor, lambda model: model.fuse_lora()):  # of which more is seen than the settings
        change(adapted)
        seen.append(settings.now())
        assert weights.changed()
    assert len({key for key, _ in seen}) == len(SETTINGS) + 3
    assert settings.now()[0] == seen[-1][0]


def test_a_call_with_a_scale_leaves_the_settings_as_they_were(pipe: Any, adapted: Any) -> None:
    _attention(adapted).processor = _attention(pipe.unet).processor
    settings, scaling = Settings(adapted), _attention(adapted).to_q.scaling
    before, _ = settings.now()
    scale = scaling["one"]
    adapted(
        torch.randn(1, 4, 8, 8), 3, encoder_hidden_states=torch.randn(1, 16, 64), cross_attention_kwargs={"scale": 0.3}
    )
    assert scaling["one"] != scale  # it lost its last bit
    assert settings.now()[0] == before
