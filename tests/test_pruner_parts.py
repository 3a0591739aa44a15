"""The Pruner's step in parts, for loops that capture a CUDA graph: advance on the host, update on the device, check."""

import math
import warnings

import pytest
import torch
from test_masks import batch, masked, small_model, weights_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pqk_fast import PQKConfig, Pruner, prepare
from pqk_fast.branches import pqk_layers
from pqk_fast.step_size import initial_step


def test_a_step_is_its_three_parts() -> None:
    config = PQKConfig(sparsity=0.8, mask_interval=4)
    models = [prepare(small_model(), config) for _ in range(2)]
    whole, parts = (Pruner(model, 20, 4) for model in models)
    for model in models:
        model(batch(0)[0])
    (pool,) = parts._pools
    place = pool.keep.data_ptr()
    for step in range(1, 21):
        for model in models:
            with torch.no_grad():
                for layer in pqk_layers(model).values():
                    layer.weight.mul_(torch.linspace(1, 1 + step / 50, layer.weight.numel()).view_as(layer.weight))
                    layer.weight_step.neg_()
        before = [layer.weight_mask.clone() for layer in pqk_layers(models[1]).values()]
        due = parts.advance()
        for layer, mask in zip(pqk_layers(models[1]).values(), before, strict=True):
            assert torch.equal(layer.weight_mask, mask)
        assert pool.keep.dtype == torch.int64
        assert pool.keep.data_ptr() == place, "a captured graph reads it there"
        parts.update(due)
        parts.check()
        assert due == whole.step() == (step % 4 == 0 and step < 20)
        for a, b in zip(*(pqk_layers(model).values() for model in models), strict=True):
            assert torch.equal(a.weight_mask, b.weight_mask)
            assert a.weight_step.item() == b.weight_step.item() == pytest.approx(1e-12)
    assert masked(models[1]) == int(0.8 * sum(w.numel() for w in weights_of(models[1])))
    with pytest.raises(ValueError, match="announced with 20 steps"):
        parts.advance()


def test_update_reads_the_number_kept_from_the_device_alone() -> None:
    """On a device that gives no value to the host (a fake GPU); what did would raise here."""
    model = prepare(small_model(), PQKConfig(sparsity=0.5, mask_interval=1))
    pruner = Pruner(model, 9, 1)
    model(batch(0)[0])
    with FakeTensorMode():
        for layer in pqk_layers(model).values():
            for name in ("weight", "weight_step"):
                setattr(layer, name, nn.Parameter(torch.empty(getattr(layer, name).shape, device="cuda")))
            layer.weight_mask = torch.empty(layer.weight.shape, dtype=torch.bool, device="cuda")
        assert pruner.advance()
        keep = pruner._pools[0].keep
        assert keep.device.type == "cuda"
        pruner.update(True)
        pruner.update(False)
        with pytest.raises(RuntimeError):  # of one kind or another, depending on the build
            int(keep)


def test_what_cannot_be_captured_says_why() -> None:
    assert Pruner(prepare(small_model()), 3, 1).why_not_capturable() is None
    model = prepare(nn.Sequential(nn.Linear(8, 8)), PQKConfig(sparsity=0.5, scope="group"))
    assert 'scope="group"' in str(Pruner(model, 3, 1).why_not_capturable())


def test_empty_layers_are_named_once_by_whoever_looks() -> None:
    model = prepare(small_model(), PQKConfig(sparsity=0.9, mask_interval=1))
    pruner = Pruner(model, 3, 1)
    model(batch(0)[0])
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    for _ in range(3):
        pruner.update(pruner.advance())
    with pytest.warns(UserWarning, match="final mask prunes every weight of layer 0"):
        pruner.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.check()


@pytest.mark.gpu
def test_two_graphs_make_the_masks_of_a_phase() -> None:
    config = PQKConfig(sparsity=0.8, mask_interval=4)
    models = [prepare(small_model().cuda(), config) for _ in range(2)]
    eager, replayed = (Pruner(model, 20, 4) for model in models)
    for model in models:
        model(batch(0)[0].cuda())
    graphs = {}
    for due in (False, True):
        replayed.update(due)
        torch.cuda.synchronize()
        graphs[due] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[due]):
            replayed.update(due)
    for _ in range(20):
        with torch.no_grad():
            for layers in zip(*(pqk_layers(model).values() for model in models), strict=True):
                noise = torch.randn_like(layers[0].weight)
                for layer in layers:
                    layer.weight.add_(noise)
        due = replayed.advance()
        graphs[due].replay()
        assert eager.step() == due
        for a, b in zip(*(pqk_layers(model).values() for model in models), strict=True):
            assert torch.equal(a.weight_mask, b.weight_mask)
    replayed.check()
    with torch.no_grad():
        models[1][0].weight.fill_(math.nan)
    graphs[True].replay()
    with pytest.raises(ValueError, match="the weight of layer '0'"):
        replayed.check()


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_so_many_masks_the_step_sizes_follow_the_kept_weights(per_channel: bool) -> None:
    config = PQKConfig(sparsity=0.8, mask_interval=2, step_tracking=3, per_channel=per_channel)
    model = prepare(small_model(), config)
    pruner = Pruner(model, 20, 4)
    model(batch(0)[0])
    layers = pqk_layers(model).values()
    told = []
    for step in range(1, 21):
        for layer in layers:
            layer.weight_step.data.fill_(0.5)
        told.append(pruner.advance())
        pruner.update(told[-1])
        for layer in layers:
            tracked = initial_step(layer.weight, layer.weight_mask, layer.bits, "mse", per_channel)
            assert torch.equal(layer.weight_step, tracked) == (step % 6 == 0), step
            assert layer.weight_step.shape == tracked.shape
    assert told == [0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 0]


def test_tracking_needs_whole_weights_and_a_grid() -> None:
    model = prepare(small_model(), PQKConfig(bits=32, mask_interval=1, step_tracking=1))
    pruner = Pruner(model, 9, 1)
    model(batch(0)[0])
    pruner.step()
    assert all(layer.weight_step.item() == 1 for layer in pqk_layers(model).values())
