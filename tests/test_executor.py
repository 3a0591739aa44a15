"""A whole network as one call of the C++ library: the model's own outputs, any layout, no step outside its memory."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import every_isa, on_threads, run_with
from test_c_source import EveryOperation, make
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast.deploy.executor import NetworkRuntime, compile_network, run_network


def trained(model: nn.Module, density: float = 0.3) -> nn.Module:
    """In evaluation mode, with statistics of some training and that part of its weights."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            kept = torch.rand(module.weight.shape, generator=generator) < density
            module.weight.data *= kept
    return model.eval().requires_grad_(False)


def inputs(network: NetworkRuntime, batch: int = 3) -> Tensor:
    return torch.randn(batch, *network.input_shape, generator=torch.Generator().manual_seed(2))


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(sample).reshape(1, -1) for sample in x.split(1)])


@pytest.mark.native
@pytest.mark.parametrize("name", ["res8", "res8_narrow", "resnet20", "every operation", "sum"])
def test_it_is_the_model(name: str) -> None:
    student, example = make(name)
    model = trained(pqk.convert(student))
    network = compile_network(model, example)
    x = inputs(network)
    assert network.takes(x)
    made, expected = network(x), one_by_one(model, x)
    torch.testing.assert_close(made.flatten(1), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(network(x), made), "what earlier calls left in memory shows"
    assert network(x[:0]).shape == made[:0].shape


class Block(nn.Module):
    """Convolutions in a row and beside each other, whose borders and strides ask for different layouts of one value."""

    def __init__(self, cases) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, *case, bias=False) for case in cases)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        parts = [F.relu(conv(x)) for conv in self.convs]
        return sum((part.mean((2, 3)) for part in parts[1:]), parts[0].mean((2, 3)))


CONVS = [  # kernel, stride, padding, dilation
    (3, 1, 1),
    (5, 1, 2),
    (1, 1, 0),
    (3, 1, 0),
    (2, 1, 1),
    ((3, 1), 1, (1, 0)),
    ((1, 4), 1, (0, 3)),
    (3, 1, 2, 2),
    (3, 2, 1),
    (1, 2, 0),
    (5, (3, 2), (2, 0)),
    ((2, 4), (1, 3), (0, 3), (2, 1)),
]


@pytest.mark.native
@pytest.mark.parametrize("one", range(len(CONVS)))
def test_layouts_for_several_readers(one: int) -> None:
    torch.manual_seed(0)
    model = trained(Block([CONVS[one], CONVS[one - 1], CONVS[one - 5]]))
    network = compile_network(model, torch.zeros(1, 2, 9, 7))
    x = inputs(network)
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.native
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (3, 400)])
def test_sizes(size) -> None:
    torch.manual_seed(0)
    model = trained(Block([CONVS[0], CONVS[1]]))
    network = compile_network(model, torch.zeros(1, 2, *size))
    x = inputs(network)
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.native
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)),
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(6, 4)),
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 4)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=4)),
        nn.Sequential(nn.AvgPool2d((3, 2), (1, 2), (1, 1)), nn.Conv2d(2, 2, (1, 2))),
    ],
    ids=["linear", "norm first", "flattened", "pooled", "relu", "groups", "pool first"],
)
def test_small_networks(model: nn.Module) -> None:
    model = trained(copy.deepcopy(model), 0.7)
    network = compile_network(model, torch.zeros(1, 2, 3, 4))
    x = inputs(network)
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.native
def test_no_weight_is_left() -> None:
    model = trained(Block([CONVS[0]]), 0.0)
    network = compile_network(model, torch.zeros(1, 2, 9, 7))
    x = inputs(network)
    assert torch.equal(network(x), model(x))


@pytest.mark.native
def test_not_a_number_comes_through() -> None:
    model = trained(Block([CONVS[0]]), 1.0)
    network = compile_network(model, torch.zeros(1, 2, 9, 7))
    x = inputs(network)
    x[1, 0, 3, 3] = float("nan")
    made = network(x)
    assert made[1].isnan().all()
    assert not made[[0, 2]].isnan().any()
    x[1] = float("inf")
    assert torch.equal(network(x)[0], made[0]), "the next sample sees nothing of it"


@pytest.mark.native
def test_threads_make_no_difference() -> None:
    student, example = make("res8")
    network = compile_network(pqk.convert(student).eval(), example)
    x = inputs(network)
    with on_threads(1):
        alone = network(x)
    with on_threads(4):
        assert torch.equal(network(x), alone)


@pytest.mark.native
@every_isa
def test_every_instruction_set(isa: str) -> None:
    run_with(
        isa,
        "import pqk_fast as pqk, test_executor as t, torch\n"
        "for name in ('res8_narrow', 'resnet20', 'every operation'):\n"
        "    student, example = t.make(name)\n"
        "    model = t.trained(pqk.convert(student))\n"
        "    network = t.compile_network(model, example)\n"
        "    x = t.inputs(network)\n"
        "    expected = t.one_by_one(model, x)\n"
        "    scale = float(expected.abs().max())\n"
        "    torch.testing.assert_close(network(x).flatten(1), expected, rtol=1e-5, atol=1e-6 * scale)\n",
    )


def test_other_inputs_go_through_the_model() -> None:
    model = trained(Block([CONVS[0]]))
    network = compile_network(model, torch.zeros(1, 2, 9, 7))
    wider = torch.randn(2, 2, 9, 8)
    assert not network.takes(wider)
    assert torch.equal(network(wider), model(wider))
    network.double()
    assert network(torch.randn(1, 2, 9, 7).double()).dtype == torch.float64


@pytest.mark.native
def test_shapes_for_tracing() -> None:
    network = compile_network(trained(EveryOperation()), torch.zeros(1, 3, 11, 17))
    arguments = (network.steps, network.places, network.numbers)
    x = torch.randn(4, 3, 11, 17)
    meta = run_network(x.to("meta"), *(a.to("meta") for a in arguments), network.sizes)
    assert meta.shape == run_network(x, *arguments, network.sizes).shape


@pytest.mark.native
@pytest.mark.parametrize("what", ["steps", "places", "sizes"])
def test_a_program_is_refused_or_stays_within_memory(what: str) -> None:
    """Some numbers of a program changed (fuzz_packed.py tries more); what is not refused must run, which the sanitizers
    watch."""
    torch.manual_seed(0)
    network = compile_network(trained(EveryOperation()), torch.zeros(1, 3, 11, 17))
    x = torch.randn(1, 3, 11, 17)
    parts = {"steps": network.steps, "places": network.places, "sizes": torch.tensor(network.sizes)}
    draw = np.random.default_rng(0)
    ran, refused = 0, []
    for _ in range(150):
        values = parts[what].clone()
        flat = values.view(-1)
        place = int(draw.integers(flat.numel()))
        old = int(flat[place])
        flat[place] = int(draw.choice([old + 1, old - 1, 0, 2 * old + 3, draw.integers(1000), 2**22, -(2**31)]))
        given = {**parts, what: values}
        try:
            run_network(x, given["steps"], given["places"], network.numbers, given["sizes"].tolist())
            ran += 1
        except RuntimeError as error:
            refused.append(str(error))
    assert all("cannot be run" in text or "values a sample" in text for text in refused)
    assert ran > 10
    assert len(refused) > 10


@pytest.mark.native
def test_a_program_of_other_types_is_refused() -> None:
    network = compile_network(trained(Block([CONVS[0]])), torch.zeros(1, 2, 9, 7))
    x = torch.zeros(1, 2, 9, 7)
    arguments = (network.steps, network.places, network.numbers)
    for i, dtype in enumerate((torch.int32, torch.int64, torch.float64)):
        wrong = [a.to(dtype) if i == k else a for k, a in enumerate(arguments)]
        with pytest.raises(RuntimeError, match="expected a program"):
            run_network(x, *wrong, network.sizes)
    with pytest.raises(RuntimeError, match="expected 126 values a sample, got 127"):
        run_network(torch.zeros(127), *arguments, network.sizes)


@pytest.mark.native
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1, padding=1)),
            (8, 6),
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 2, padding=3), nn.Conv2d(5, 4, 1)), (4, 7)),
    ],
)
def test_padding_by_more_than_a_kernel_takes_away(model: nn.Module, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape)
    model = model.eval().requires_grad_(False)
    torch.testing.assert_close(compile_network(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_says_so_at_once() -> None:
    pool = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 2, ceil_mode=True)).eval()
    with pytest.raises(ValueError, match=r"\(3, 3\) windows over \(2, 2\) values \(ceil_mode\) is not supported"):
        compile_network(pool, torch.zeros(1, 3, 2, 2))
    for layer in (nn.BatchNorm2d(4), nn.Dropout(0.5)):
        with pytest.raises(ValueError, match=r"expected a network in evaluation mode: call model\.eval\(\) first"):
            compile_network(nn.Sequential(nn.Conv2d(3, 4, 1), layer), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="expected a plain network, got a prepared one"):
        compile_network(pqk.prepare(nn.Sequential(nn.Conv2d(3, 4, 1))).eval(), torch.zeros(1, 3, 4, 4))
