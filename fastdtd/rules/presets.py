"""Presets: a rule for each kind of layer, and for those that read the network's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdtd.graph import (
    Activation,
    Add,
    AveragePool2d,
    BatchNorm,
    Conv2d,
    Dense,
    GlobalAveragePool,
    GroupNorm,
    Layer,
    LocalResponseNorm,
    MaxPool2d,
    Multiply,
    Resize,
)
from fastdtd.rules.rule import Rule

Table = Mapping[type[Layer], Rule]

KERNELS = (Conv2d, Dense)
SUMS = (Add, AveragePool2d, GlobalAveragePool, Resize)
_IDENTITY, _HOLD = Rule("identity"), Rule("hold")


@dataclass(frozen=True)
class Preset:
    """What a name stands for: the rule of each kind of layer.

    text : what it computes, in a line
    hidden : rules of all layers, where the other tables say nothing else
    first : rules of layers that read the network's input, or sums and pools of it
    first_unbounded : the same where the model has no value box; None: as `first`
    refused : for kinds of layer that the original cannot explain, why; of BatchNorm, for those that one is folded into
    only_first : the original has the rules of `first` for one layer, the one that its source registers first
    """

    text: str
    hidden: Table
    first: Table = field(default_factory=dict)
    first_unbounded: Table | None = None
    refused: Mapping[type[Layer], str] = field(default_factory=dict)
    only_first: bool = False

    def rule(self, kind: type[Layer], is_hidden: bool, is_bounded: bool) -> Rule:
        """Of a layer of this kind, by what is known of its input."""
        first = self.first if is_bounded or self.first_unbounded is None else self.first_unbounded
        return self.hidden[kind] if is_hidden else first.get(kind, self.hidden[kind])


def _all(kinds: tuple[type[Layer], ...], rule: Rule) -> dict[type[Layer], Rule]:
    return dict.fromkeys(kinds, rule)


def _table(convolution: Rule, dense: Rule, sums: Rule, norm: Rule = _IDENTITY, product: Rule = _HOLD) -> Table:
    return {Conv2d: convolution, Dense: dense, GroupNorm: convolution, **_all(SUMS, sums), LocalResponseNorm: norm,
            Multiply: product, MaxPool2d: Rule("winner")}


# z+ whatever the sign of an output: what others call z+, or alpha 1 beta 0
_ALPHA_1_BETA_0 = Rule("alpha-beta", alpha=1, beta=0, epsilon=0, bias="ignored")
_ZENNIT_PLUS = Rule("z+", bias="absorbed", epsilon=1e-6)
_ZENNIT_EPSILON = Rule("epsilon", epsilon=1e-6)
_INNVESTIGATE = _table(_ALPHA_1_BETA_0, _ALPHA_1_BETA_0, Rule("flat"))
_INNVESTIGATE_REFUSES: dict[type[Layer], str] = {
    Add: "an addition, to both inputs of which iNNvestigate passes all relevance, so that it doubles",
    Multiply: "a product of computed tensors, for which iNNvestigate has no rule",
    Activation: "no ReLU, for which alone iNNvestigate's deep Taylor is made",
    GroupNorm: "a normalisation by the image's own statistics, which iNNvestigate does not explain",
    BatchNorm: "one that a batch norm, or another scaling of channels, is folded into, while iNNvestigate has a rule "
               "for it by itself, which is not computed here",
}
_CAPTUM_REFUSES: dict[type[Layer], str] = {
    Multiply: "a product of computed tensors, which Captum differentiates, so that nothing is conserved",
    Activation: "a smooth activation, of which Captum's LRP explains tanh alone",
    GroupNorm: "a normalisation by the image's own statistics, for which Captum's LRP has no rule",
}
_ZENNIT_REFUSES: dict[type[Layer], str] = {
    Multiply: "a product of computed tensors, to either of which zennit gives relevance times the other, so that "
              "nothing is conserved",
    GroupNorm: "a normalisation by the image's own statistics, which zennit differentiates, so that nothing is "
               "conserved",
}
_GRADIENT = _table(*[Rule("gradient")] * 5)

PRESETS: dict[str, Preset] = {
    "dtd": Preset(
        "by each layer's input domain: z+ in hidden layers, zB at an input with bounds, w2 at one without",
        _table(*[Rule("z+")] * 3), _all((*KERNELS, *SUMS), Rule("zB")), _all((*KERNELS, *SUMS), Rule("w2"))),
    "innvestigate.deep_taylor": Preset(
        "iNNvestigate's: z+ in every layer, the first too; average pools redistribute evenly; no additions",
        _INNVESTIGATE, refused=_INNVESTIGATE_REFUSES),
    "innvestigate.deep_taylor.bounded": Preset(
        "the same, with zB in layers that read the input", _INNVESTIGATE, _all(KERNELS, Rule("zB")),
        refused=_INNVESTIGATE_REFUSES),
    "zennit.epsilon_plus": Preset(
        "zennit's EpsilonPlus: z+ with positive biases in convolutions, epsilon in dense layers",
        _table(_ZENNIT_PLUS, _ZENNIT_EPSILON, _ZENNIT_EPSILON), refused=_ZENNIT_REFUSES),
    "zennit.epsilon_plus_flat": Preset(
        "the same, flat in the first", _table(_ZENNIT_PLUS, _ZENNIT_EPSILON, _ZENNIT_EPSILON),
        _all(KERNELS, Rule("flat")), refused=_ZENNIT_REFUSES, only_first=True),
    "zennit.epsilon_alpha2_beta1": Preset(
        "zennit's EpsilonAlpha2Beta1: alpha 2, beta 1 in convolutions, epsilon in dense layers",
        _table(Rule("alpha-beta", alpha=2, beta=1), _ZENNIT_EPSILON, _ZENNIT_EPSILON), refused=_ZENNIT_REFUSES),
    "zennit.epsilon_gamma_box": Preset(
        "zennit's EpsilonGammaBox: gamma in convolutions, epsilon in dense layers, zB in the first",
        _table(Rule("gamma", gamma=0.25), _ZENNIT_EPSILON, _ZENNIT_EPSILON), {Conv2d: Rule("zB")},
        refused=_ZENNIT_REFUSES, only_first=True),
    "zennit.excitation_backprop": Preset(
        "zennit's ExcitationBackprop: z+ with positive biases in every layer",
        _table(_ZENNIT_PLUS, _ZENNIT_PLUS, _ZENNIT_EPSILON), refused=_ZENNIT_REFUSES),
    "captum.lrp": Preset("Captum's LRP: epsilon in every layer", _table(*[Rule("epsilon", epsilon=1e-9)] * 3),
                         refused=_CAPTUM_REFUSES),
    "gradient": Preset("the derivative of the score", _GRADIENT),
    "gradient*input": Preset("the derivative of the score times the input", _GRADIENT),
    "sensitivity": Preset("the square of the score's derivative, to compare with", _GRADIENT),
}
DERIVATIVES = ("gradient", "gradient*input", "sensitivity")  # presets that derive and do not redistribute
