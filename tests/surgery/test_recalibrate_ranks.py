"""recalibrate in four real processes, and in a group of two of them, against one process that has all data.

The file is its own worker: importing torch in four processes takes seconds, so they start once and run every case.
"""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from normwright import SplitBatchNorm
from normwright.layers.sync_batch_norm import SyncBatchNorm
from normwright.surgery import recalibrate
from normwright.surgery.recalibrate import METHODS

SIZE = 4
PARTS = ([5, 3], [], [6, 6, 2], [1])  # the batches of each process, in samples
# the layer that gets no share in one process gets one in two of them
PAIR = (0, 2)


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3), norm(3), nn.Dropout(0.5))


def data(sizes=PARTS):
    """For each process its batches; their means differ, so that a wrong merge shows."""
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(n, 2, 8, 8, generator=generator) * (i + 1) + i for n in own] for i, own in enumerate(sizes)]


def stream(rank, batches):
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(8, 3, generator=generator) * 2 + 1 for _ in range(batches)]


def buffers(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num_b" in key}


class Order(nn.Module):
    """Two layers, in an order of this process's own."""

    def __init__(self, names):
        super().__init__()
        self.a, self.b, self.names = nn.BatchNorm1d(3), nn.BatchNorm1d(3), names

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def attempt(model, *args, **options):
    """What recalibrate raised here, and whether the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    try:
        recalibrate(model, *args, **options)
    except Exception as error:
        kept = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        return f"{type(error).__name__}: {error}", kept
    return "nothing", False


def work(rank):
    """Every case, in this process; what the parent compares."""
    mine, found = data()[rank], {}
    for method in METHODS:
        model = net()
        receipt = recalibrate(model, mine, method=method)
        found[method] = buffers(model), receipt.facts
        receipt.undo()
        found[f"{method} undone"] = buffers(model)
    for kind in (nn.SyncBatchNorm, SyncBatchNorm):
        for method in METHODS:
            model = net(kind)
            recalibrate(model, mine, method=method)
            found[f"{kind.__module__}.{method}"] = buffers(model)
    model = nn.Sequential(SplitBatchNorm(2, 2), nn.BatchNorm2d(2))
    recalibrate(model, domains={1: mine, 0: [batch * 3 for batch in mine]})
    found["domains"] = buffers(model)
    layer = nn.BatchNorm1d(3)
    facts = recalibrate(layer, stream(rank, 20 * rank), tolerance=0.065).facts
    found["tolerance"] = buffers(layer), facts
    layer = nn.BatchNorm1d(3)
    recalibrate(layer, stream(rank, rank), stats="ema")
    found["ema"] = buffers(layer)
    model = net()
    recalibrate(model, data(([4], [3], [2], [2]))[rank], process_group=False)
    found["alone"] = buffers(model)
    pair = dist.new_group(list(PAIR))
    if rank in PAIR:
        model = net()
        facts = recalibrate(model, mine, process_group=pair).facts
        found["pair"] = buffers(model), facts
    else:
        found["outside"] = attempt(net(), mine, process_group=pair)
    dist.barrier()

    # errors: the processes go on together after each
    def broken(model, batch):
        if rank == 2 and len(batch) == 2:  # the last batch of one process
            raise OSError("the disk is gone")
        return model(batch)

    for method in METHODS:
        found[f"model raises, {method}"] = attempt(net(), mine, method=method, forward=broken)
    found["frozen"] = attempt(net(), mine, frozen=["absent"] if rank == 1 else [])
    found["differ"] = attempt(net().eval() if rank == 3 else net(), mine, method=METHODS[rank == 3])
    found["inputs"] = attempt(net(), mine, inputs=torch.randn(2, 7) if rank == 0 else None)
    found["order"] = attempt(Order("ba" if rank == 3 else "ab"), stream(rank, 2))
    found["empty"] = attempt(net(), [])
    found["nan"] = attempt(net(), [batch * (float("nan") if rank == 2 else 1) for batch in mine])
    lengths = iter((2, 3))
    found["length"] = attempt(Order("ab"), Shrinking(stream(rank, 3), lengths) if rank == 2 else stream(rank, 2))
    dist.barrier()
    return found


class Shrinking:
    """A loader that gives another number of batches in each pass."""

    def __init__(self, batches, lengths):
        self.batches, self.lengths = batches, lengths

    def __iter__(self):
        return iter(self.batches[: next(self.lengths)])


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for rank in range(SIZE)
        ]
        try:
            said = [worker.communicate(timeout=120)[0].decode() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert all(worker.returncode == 0 for worker in workers), "\n".join(said)
        yield [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def same_bits(results, case):
    values = [found[case][0] if isinstance(found[case], tuple) else found[case] for found in results]
    for other in values[1:]:
        for key, value in values[0].items():
            assert torch.equal(value, other[key]), (case, key)
    return values[0]


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=2e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def alone(model, batches, **options):
    recalibrate(model, batches, **options)
    return buffers(model)


EVERY = [batch for own in data() for batch in own]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_processes_are_one_with_all_data(results, method):
    got = same_bits(results, method)
    close(got, alone(net(), EVERY, method=method))
    facts = {"method": method, "batches": 6, "passes": 2 if method == "layerwise" else 1, "processes": 4}
    assert [found[method][1] for found in results] == [facts] * 4
    # what one process would have had without the others is something else
    own = alone(net(), data()[2], method=method)
    assert not torch.allclose(own["1.running_mean"], got["1.running_mean"], rtol=0.1)
    for found in results:
        close(found[f"{method} undone"], buffers(net()))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, SyncBatchNorm], ids=["torch", "ours"])
def test_sync_batch_norm_waits_for_nobody(results, kind, method):
    close(same_bits(results, f"{kind.__module__}.{method}"), alone(net(), EVERY, method=method))


@pytest.mark.slow
def test_domains_tolerance_and_averages(results):
    layers = nn.Sequential(SplitBatchNorm(2, 2), nn.BatchNorm2d(2))
    close(same_bits(results, "domains"), alone(layers, None, domains=[[b * 3 for b in EVERY], EVERY]))

    # processes 1 to 3 have 20, 40 and 60 batches; all stop after the same number of rounds
    got, facts = same_bits(results, "tolerance"), results[0]["tolerance"][1]
    read = got["num_batches_tracked"].item()
    assert 48 < facts["batches"] == read < 120  # more than the first round, not all
    assert facts["standard error"] <= 0.065
    each = next(n for n in (16, 20, 25, 32, 40, 50) if min(n, 20) + min(n, 40) + n == read)
    used = torch.cat([batch for rank in range(4) for batch in stream(rank, 20 * rank)[:each]]).double()
    torch.testing.assert_close(got["running_mean"].double(), used.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["running_var"].double(), used.var(0), rtol=1e-6, atol=1e-6)

    # the processes' averages, each by the weight that its batches have together
    weights, total = [0.0] * 4, torch.zeros(3).double()
    for rank in range(4):
        for age, batch in enumerate(reversed(stream(rank, rank))):
            weights[rank] += 0.9**age
            total += 0.9**age * batch.double().mean(0)
    got = same_bits(results, "ema")
    torch.testing.assert_close(got["running_mean"].double(), total / sum(weights), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_group_of_two_and_each_alone(results):
    pair = [results[rank] for rank in PAIR]
    close(same_bits(pair, "pair"), alone(net(), data()[0] + data()[2]))
    assert pair[0]["pair"][1]["processes"] == 2
    assert results[1]["outside"][0].startswith("ValueError: A process recalibrates within a group")
    for rank, found in enumerate(results):
        close(found["alone"], alone(net(), data(([4], [3], [2], [2]))[rank]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rank", "here", "elsewhere"),
    [
        *[
            (f"model raises, {method}", 2, "OSError: the disk", "process 2 raised OSError: the disk is gone. Nothing")
            for method in METHODS
        ],
        ("frozen", 1, "ValueError: frozen= names", "process 1 raised ValueError: frozen="),
        ("inputs", 0, "RuntimeError: ", "process 0 raised RuntimeError"),
        ("differ", None, "process 3 does not do as process 0", None),
        ("order", None, "processes met different ones first: 'a', 'b'", None),
        ("empty", None, "there were no batches", None),
        ("nan", None, "'1' over these batches is not finite in 4 of 4", None),
        ("length", None, "first pass of process 2 had 2 batches and pass 2 had 3", None),
    ],
)
def test_an_error_in_one_is_raised_in_all(results, case, rank, here, elsewhere):
    for i, found in enumerate(results):
        said, kept = found[case]
        assert (here if rank is None or i == rank else elsewhere) in said
        if i != rank:
            assert said.startswith("ValueError" if rank is None else "RuntimeError: Processes recalibrate together")
        assert kept


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
