"""The rule sets: their tables against the printed ones, and that they coincide at the base width."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_mup.model.config import InitialScale, ModelSettings, model_shape
from gdn_mup.model.language_model import LanguageModel, initialize, parameter_table
from gdn_mup.scaling.apply import ModelScaling, distinct_rules, scale_model, scale_rule_sets
from gdn_mup.scaling.growth import Axes, Growth, ParameterInfo, Part, growth_between
from gdn_mup.scaling.rules import MATRICES, ONE, PRINCIPAL, RULE_SETS, Scaling
from gdn_mup.training.clipping import norm_weights
from gdn_mup.training.config import TrainingSettings
from gdn_mup.training.optimizers import MemberOptimizer

OPTIMIZERS = ("adamw", "sgd")
GROWTH_MODES = ("heads", "head_dim")
VOCABULARY = 16


def parameters(growth: str, width: int, tied: bool = False) -> dict[str, ParameterInfo]:
    """The language model's parameters at a width; the base width is 32."""
    return parameter_table(model_shape(ModelSettings(tied_embeddings=tied), width, growth, VOCABULARY))


def scaled(growth: str, rules: str, optimizer: str, m: int = 4, tied: bool = False) -> ModelScaling:
    """The multipliers at m times the base width."""
    return scale_model(parameters(growth, 32, tied), parameters(growth, 32 * m, tied), m, rules, optimizer)


# At the base width.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_every_multiplier_is_exactly_one_at_the_base_width(growth, rules, optimizer, tied):
    """But for the weight decay of what does not decay."""
    scaling = scaled(growth, rules, optimizer, m=1, tied=tied)
    for name, info in parameters(growth, 32, tied).items():
        decays = float(info.part in RULE_SETS[rules].decays)
        assert scaling.parameters[name] == Scaling(1.0, 1.0, 1.0, decays)
    assert scaling.logits == 1.0


def test_matrices_decay_and_vectors_do_not():
    for rules in PRINCIPAL:
        assert RULE_SETS[rules].decays == MATRICES
    table = parameters("heads", 32)
    assert {info.part in MATRICES: len(info.shape) for info in table.values()} == {True: 2, False: 1}
    assert all((len(info.shape) == 2) is (info.part in MATRICES) for info in table.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_rule_sets_train_the_same_model_at_the_base_width_bit_for_bit(growth, optimizer, tied):
    """Initial parameters, losses and parameters over three steps; and not so at twice that width."""
    agreeing = [name for name, rules in RULE_SETS.items() if rules.decays == MATRICES]

    def train(m: int) -> list[torch.Tensor]:
        base, target = (
            model_shape(ModelSettings(tied_embeddings=tied), width, growth, VOCABULARY) for width in (32, 32 * m)
        )
        scalings = scale_rule_sets(parameter_table(base), parameter_table(target), m, agreeing, optimizer)
        members = list(scalings.values())
        model = LanguageModel(target, len(members))
        initialize(model, base, InitialScale(), members, seed=3)
        training = TrainingSettings(weight_decay=0.1, clipping="none")
        weights = norm_weights("none", members, list(model.weights), torch.device("cpu"))
        steps = MemberOptimizer(optimizer, model, members, [0.01] * len(members), weights, training)
        seen = [weight.clone() for weight in model.weights.values()]
        random = torch.Generator().manual_seed(0)
        for _ in range(3):
            model.zero_grad()
            losses = model.losses(torch.randint(VOCABULARY, (2, 9), generator=random))
            losses.sum().backward()
            steps.step(1.0)
            seen += [losses.detach(), *(weight.clone() for weight in model.weights.values())]
        return seen

    assert all(torch.equal(member, tensor[0]) for tensor in train(1) for member in tensor)
    last_losses = train(2)[-1 - len(parameters(growth, 32, tied))]
    assert len(set(last_losses.tolist())) > 1


@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_rule_sets_that_coincide_are_trained_once(growth):
    def distinct(m: int, optimizer: str) -> dict[str, str]:
        tables = parameters(growth, 32), parameters(growth, 32 * m)
        return distinct_rules(scale_rule_sets(*tables, m, PRINCIPAL, optimizer))

    for optimizer in OPTIMIZERS:
        assert distinct(1, optimizer) == dict.fromkeys(PRINCIPAL, "sp")
    # Under AdamW the paper's rules and its "original μP" differ in nothing but their source.
    adamw = {"sp": "sp", "mup": "mup", "yang_hu": "yang_hu", "liu_gu": "mup", "gdn_mup": "gdn_mup"}
    assert distinct(2, "adamw") == adamw
    # Under SGD there is no ε, in which alone μP as published differs from ours.
    assert distinct(2, "sgd") == {name: name for name in PRINCIPAL} | {"gdn_mup": "yang_hu"}


# The printed tables, at m = 4: init std, AdamW learning rate, SGD learning rate.

HALF, QUARTER = Fraction(1, 2), Fraction(1, 4)
HIDDEN = ("q", "k", "v", "g", "o", "mlp_gate", "mlp_up", "mlp_down")
GATE_PROJECTIONS = ("alpha_projection", "beta_projection")
GATE_SCALARS = ("A_log", "dt_bias")
CONVS = ("q_conv", "k_conv", "v_conv")
NORMS = ("mixer_norm", "mlp_norm", "o_norm")

MUP = {
    **dict.fromkeys(HIDDEN + GATE_PROJECTIONS, (HALF, QUARTER, 1)),
    **dict.fromkeys(GATE_SCALARS + CONVS + NORMS, (1, 1, 1)),
    "embedding": (1, 1, 4),
    "readout": (QUARTER, QUARTER, QUARTER),
}
LIU_GU = MUP | {
    **dict.fromkeys(GATE_PROJECTIONS, (HALF, QUARTER, HALF)),
    **dict.fromkeys(GATE_SCALARS, (1, 1, 2)),
}
BOTH, FAN_OUT, FAN_IN, NONE = (HALF, QUARTER, 1), (1, 1, 4), (QUARTER, QUARTER, QUARTER), (1, 1, 1)
GDN_MUP = {
    **dict.fromkeys(HIDDEN, BOTH),
    **dict.fromkeys((*CONVS, "mixer_norm", "mlp_norm", "final_norm", "embedding"), FAN_OUT),
    "readout": FAN_IN,
}
GDN_MUP_HEADS = GDN_MUP | {
    **dict.fromkeys(GATE_PROJECTIONS, BOTH),
    **dict.fromkeys(GATE_SCALARS, FAN_OUT),
    "o_norm": NONE,
}
GDN_MUP_HEAD_DIM = GDN_MUP | {
    **dict.fromkeys(GATE_PROJECTIONS, FAN_IN),
    **dict.fromkeys(GATE_SCALARS, NONE),
    "o_norm": FAN_OUT,
}
SP = {
    **dict.fromkeys((*HIDDEN, *GATE_PROJECTIONS, "readout"), (HALF, 1, 1)),
    **dict.fromkeys((*GATE_SCALARS, *CONVS, *NORMS, "embedding"), (1, 1, 1)),
}
# As the released code of arXiv 2606.04048 has it: model/gdn-sp.py, _init_weights; train_adam_finewebedu.py
# with utils/gdn_adam_utils.py; train_sgd_finewebedu.py with utils/gdn_sgd_utils.py. There embeddings are tied; the rows
# of an untied readout are those of the text.
SP_RELEASED = dict.fromkeys((*SP, "final_norm"), (1, 1, 1))
LIU_GU_RELEASED = LIU_GU | {
    **dict.fromkeys(CONVS, (HALF, QUARTER, 1)),
    **dict.fromkeys((*NORMS, "final_norm"), (1, QUARTER, 1)),
}
# model/gdn-mup.py multiplies the mixer's output by 1/m, which is W_o/m in the place of W_o.
LIU_GU_RELEASED_MIXER = LIU_GU_RELEASED | {"o": (HALF * QUARTER, QUARTER**2, QUARTER**2)}


@pytest.mark.parametrize(
    ("growth", "rules", "printed"),
    [(growth, "sp", SP) for growth in GROWTH_MODES]
    + [(growth, "mup", MUP) for growth in GROWTH_MODES]
    + [(growth, "liu_gu", LIU_GU) for growth in GROWTH_MODES]
    + [(growth, "sp_released", SP_RELEASED) for growth in GROWTH_MODES]
    + [(growth, "liu_gu_released", LIU_GU_RELEASED) for growth in GROWTH_MODES]
    + [(growth, "liu_gu_released_mixer", LIU_GU_RELEASED_MIXER) for growth in GROWTH_MODES]
    + [("heads", rules, GDN_MUP_HEADS) for rules in ("gdn_mup", "yang_hu")]
    + [("head_dim", rules, GDN_MUP_HEAD_DIM) for rules in ("gdn_mup", "yang_hu")],
)
def test_multipliers_are_those_of_the_printed_table(growth, rules, printed):
    adamw, sgd = (scaled(growth, rules, optimizer).parameters for optimizer in OPTIMIZERS)
    assert {name.rpartition(".")[2] for name in adamw} <= printed.keys() | {"final_norm"}
    for name in adamw:
        row = printed.get(name.rpartition(".")[2], (1, 1, 1))  # final_norm is a norm like the others
        assert (adamw[name].init_std, adamw[name].learning_rate, sgd[name].learning_rate) == row, name
        assert sgd[name].init_std == adamw[name].init_std


def test_epsilon_and_weight_decay_of_gdn_mup_are_those_of_the_printed_table():
    adamw, sgd = (scaled("head_dim", "gdn_mup", optimizer).parameters for optimizer in OPTIMIZERS)
    assert {name: (s.epsilon, s.weight_decay) for name, s in adamw.items() if name in printed_decay} == printed_decay
    assert {s.learning_rate * s.weight_decay for s in [*adamw.values(), *sgd.values()]} == {0, 1}
    assert all(s.epsilon == 1 for s in sgd.values())


printed_decay = {
    "0.q": (QUARTER, 4),
    "embedding": (QUARTER, 1),
    "0.q_conv": (QUARTER, 1),
    "0.o_norm": (QUARTER, 0),
    "readout": (1, 4),
    "0.beta_projection": (1, 4),
    "0.dt_bias": (1, 0),
}


@pytest.mark.parametrize("rules", ["sp", "mup", "liu_gu", "sp_released", "liu_gu_released"])
def test_the_papers_rules_scale_neither_epsilon_nor_weight_decay(rules):
    scalings = scaled("heads", rules, "adamw").parameters.values()
    assert {(s.epsilon, s.weight_decay) for s in scalings} == {(1.0, 1.0), (1.0, 0.0)}


@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_mup_as_published_is_gdn_mup_without_its_epsilon(growth):
    ours, theirs = (scaled(growth, rules, "adamw").parameters for rules in ("gdn_mup", "yang_hu"))
    assert theirs == {name: scaling._replace(epsilon=1.0) for name, scaling in ours.items()}
    assert ours != theirs


@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_in_the_released_code_of_sp_every_matrix_is_drawn_alike_at_every_width(growth):
    """From gains for a base width of 64 that give the code's 0.02, and under its μP ∝ 1/√width; the embedding never."""
    base = model_shape(ModelSettings(base_width=64), 64, growth, 512)
    fan_ins = {"hidden": 64, "gate": 64, "residual": base.mlp_width, "mixer_output": 32, "short_conv": 4}
    scale = InitialScale(embedding=0.02, **{group: 0.02 * fan_in**0.5 for group, fan_in in fan_ins.items()})
    for m in (1, 4):
        target = model_shape(ModelSettings(base_width=64), 64 * m, growth, 512)
        rules = ("sp_released", "liu_gu_released")
        members = list(scale_rule_sets(parameter_table(base), parameter_table(target), m, rules, "adamw").values())
        model = LanguageModel(target, 2)
        initialize(model, base, scale, members, seed=0)
        for name, info in parameter_table(target).items():
            if info.part in (Part.NORM, Part.GATE_SCALAR, Part.READOUT):
                continue
            sp, mup = (float(weight.std()) for weight in model.weights[name])
            tolerance = 5 / weight_count(info) ** 0.5
            assert sp == pytest.approx(0.02, rel=tolerance), name
            assert mup == pytest.approx(sp * (1 if name == "embedding" else m**-0.5), rel=1e-5), name


def weight_count(info: ParameterInfo) -> int:
    return info.shape[0] * info.shape[1]


@pytest.mark.parametrize("keeps_decay", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_multiplier_folded_into_a_parameter_trains_as_the_multiplier_does(optimizer, keeps_decay):
    """The mixer's output × 1/m as a factor in the forward pass, and by the rule set's row; float64, six updates."""
    row = RULE_SETS["liu_gu_released_mixer"].rows[Part.MIXER_OUTPUT]
    plain, growth = row._replace(multiplier=ONE), Growth(4.0, 4.0, 4.0)
    factor = row.multiplier(growth)
    assert factor == QUARTER
    make = {
        "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95)),
        "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    }[optimizer]
    random = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(5, 5, generator=random, dtype=torch.float64) for _ in range(3))
    ends = []
    for scaling, forward in ((plain.scaling(growth, optimizer, keeps_decay), factor), (None, 1.0)):
        rule = scaling or row.scaling(growth, optimizer, keeps_decay)
        weight = torch.nn.Parameter(w * rule.init_std)
        options = {"lr": 0.1 * rule.learning_rate, "weight_decay": 0.3 * rule.weight_decay}
        options |= {"eps": 1e-3 * rule.epsilon} if optimizer == "adamw" else {}
        steps = make([weight], **options)
        for _ in range(6):
            steps.zero_grad()
            ((forward * x @ weight - y) ** 2).mean().backward()
            steps.step()
        ends.append(forward * weight.detach())
    assert torch.allclose(*ends, rtol=1e-12, atol=0)
    assert not torch.allclose(ends[0], w * row.init_std(growth) * factor, rtol=1e-3)


def test_a_variant_goes_back_to_a_principal_rule_set():
    families = {name: rules.family for name, rules in RULE_SETS.items()}
    assert {name: families[name] for name in PRINCIPAL} == {name: name for name in PRINCIPAL}
    assert {name: family for name, family in families.items() if name not in PRINCIPAL} == {
        "sp_released": "sp",
        "liu_gu_released": "liu_gu",
        "liu_gu_released_mixer": "liu_gu",
        "gdn_mup_constant_decay": "gdn_mup",
        "gdn_mup_hidden_decay": "gdn_mup",
    }


def test_in_the_released_code_convolutions_decay_and_the_embedding_does_not():
    assert RULE_SETS["sp_released"].decays == MATRICES
    for rules in ("liu_gu_released", "liu_gu_released_mixer"):
        assert RULE_SETS[rules].decays == MATRICES - {Part.EMBEDDING}


@pytest.mark.parametrize("growth", GROWTH_MODES)
def test_the_variants_of_gdn_mup_differ_from_it_in_weight_decay_alone(growth):
    """At four times the base width; in the one λ stays as it is, in the other three kinds of matrices lose it."""
    table = parameters(growth, 128)
    ours, constant, hidden = (
        scaled(growth, rules, "adamw").parameters
        for rules in ("gdn_mup", "gdn_mup_constant_decay", "gdn_mup_hidden_decay")
    )
    for name, info in table.items():
        decays = info.part in MATRICES
        assert constant[name] == ours[name]._replace(weight_decay=float(decays))
        undecayed = name.rpartition(".")[2] in ("embedding", "readout", *CONVS)
        assert hidden[name] == (ours[name]._replace(weight_decay=0.0) if undecayed else ours[name])
    assert ours["0.q"].learning_rate * ours["0.q"].weight_decay == 1
    assert constant["0.q"].learning_rate * constant["0.q"].weight_decay == QUARTER


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_does_not_decay_keeps_its_size_where_gradients_vanish(optimizer):
    """Training with a learning rate and weight decay, but no gradient: decayed parameters shrink, others stay."""
    shape = model_shape(ModelSettings(), 32, "heads", VOCABULARY)
    names = ("gdn_mup", "gdn_mup_hidden_decay")
    members = [scaled("heads", rules, optimizer, m=1) for rules in names]
    model = LanguageModel(shape, len(members))
    initialize(model, shape, InitialScale(), members, seed=3)
    weights = norm_weights("none", members, list(model.weights), torch.device("cpu"))
    training = TrainingSettings(weight_decay=0.5, clipping="none")
    before = {name: weight.clone() for name, weight in model.weights.items()}
    steps = MemberOptimizer(optimizer, model, members, [0.1] * len(members), weights, training)
    (model.losses(torch.zeros(1, 3, dtype=torch.long)) * 0).sum().backward()
    steps.step(1.0)
    for name, info in parameters("heads", 32).items():
        for member, rules in enumerate(names):
            shrinks = not torch.equal(model.weights[name][member], before[name][member])
            assert shrinks is (info.part in RULE_SETS[rules].decays), (rules, name)


@pytest.mark.parametrize(("rules", "expected"), [(name, 1 if name.startswith("sp") else QUARTER) for name in RULE_SETS])
def test_a_tied_readout_is_an_output_multiplier_and_the_embedding_keeps_its_row(rules, expected):
    tied, untied = (scaled("heads", rules, "sgd", tied=tied) for tied in (True, False))
    assert tied.logits == expected
    assert untied.logits == 1
    assert "readout" not in tied.parameters
    assert tied.parameters["embedding"] == untied.parameters["embedding"]


# Growth from shapes.


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    names=st.lists(st.text(min_size=1), min_size=len(parameters("heads", 32)), max_size=60, unique=True),
    growth=st.sampled_from(GROWTH_MODES),
    rules=st.sampled_from(sorted(RULE_SETS)),
    optimizer=st.sampled_from(OPTIMIZERS),
    m=st.sampled_from([1, 2, 3, 8]),
)
def test_renaming_parameters_changes_nothing(names, growth, rules, optimizer, m):
    base, target = parameters(growth, 32), parameters(growth, 32 * m)
    renamed = dict(zip(base, names, strict=False))

    def rename(table: dict) -> dict:
        return {renamed[name]: value for name, value in table.items()}

    plain = scale_model(base, target, m, rules, optimizer)
    anonymous = scale_model(rename(base), rename(target), m, rules, optimizer)
    assert anonymous == plain._replace(parameters=rename(plain.parameters))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(part=st.sampled_from(list(Part)), fan_in=st.integers(1, 64), fan_out=st.integers(1, 64), m=st.integers(2, 9))
def test_gdn_mup_looks_at_shapes_and_not_at_what_a_parameter_is_for(part, fan_in, fan_out, m):
    """A parameter of any part falls under the row of the axes that grow."""
    for axes, grows_in, grows_out in (
        (Axes.BOTH, m, m),
        (Axes.FAN_IN, m, 1),
        (Axes.FAN_OUT, 1, m),
        (Axes.NONE, 1, 1),
    ):
        base = ParameterInfo((fan_out, fan_in), fan_out, fan_in, part)
        shape = (fan_out * grows_out, fan_in * grows_in)
        growth = growth_between(base, ParameterInfo(shape, *shape, part), m)
        assert growth.axes is axes
        gdn_mup = RULE_SETS["gdn_mup"]
        assert gdn_mup.row(part, growth) is gdn_mup.rows[axes]


@pytest.mark.parametrize("rules", RULE_SETS)
def test_a_target_narrower_than_the_base_is_the_inverse(rules):
    wider, narrower = (
        scale_model(parameters("heads", a), parameters("heads", b), b / a, rules, "adamw").parameters
        for a, b in ((32, 128), (128, 32))
    )
    for name in wider:
        for up, down in zip(wider[name], narrower[name], strict=True):
            assert up * down == 1 or up == down == 0


# Errors.


def test_models_with_different_parameters_are_refused_by_name():
    deeper = parameters("heads", 64) | {"2.q": parameters("heads", 64)["1.q"]}
    with pytest.raises(ValueError, match=r"differ in their parameters: 2\.q"):
        scale_model(parameters("heads", 32), deeper, 2, "gdn_mup", "adamw")


def test_a_tied_and_an_untied_model_cannot_be_compared():
    with pytest.raises(ValueError, match="readout"):
        scale_model(parameters("heads", 32), parameters("heads", 64, tied=True), 2, "gdn_mup", "adamw")


def test_an_unknown_rule_set_is_an_error():
    with pytest.raises(KeyError, match="ntk"):
        scaled("heads", "ntk", "adamw")
