"""``auto`` by the table: which measurements count for a call, and which do not."""

import itertools

import pytest
import torch
from test_attention import PREFIX
from test_backend_choice import add, call_of, made
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from atman_triton import attention, backend_registry, backend_table, explain_backend

NAME = "Made GPU"
BARE = {
    "device": NAME,
    "triton": "3.7",
    "torch": backend_table.major_minor(torch.__version__),
    "dtype": "float32",
    "head_dim": 16,
    "value_dim": 16,
    "mode": "multiplicative",
    "factors": "every key",
    "causal": True,
    "grouped": True,
    "direction": "forward",
    "queries": 64,
    "tokens": 64,
    "shape": "B2-Hq4-Hk2-T64-D16",
    "backend": "torch",
    "milliseconds": 2.0,
    "commit": "0123456789",
    "date": "2026-01-02",
}


def rows_at(tokens, times, **changes):
    """Times by backend of one setup."""
    shape = {"queries": tokens, "tokens": tokens, "shape": f"B2-Hq4-Hk2-T{tokens}-D16"}
    return [
        backend_table.MeasuredRow(
            **(BARE | shape | {"backend": name, "milliseconds": milliseconds} | changes)
        )
        for name, milliseconds in times.items()
    ]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Write the rows of a made GPU, which the CPU then passes for."""

    def write(*rows):
        path = tmp_path / "table.csv"
        backend_table.write_table(itertools.chain(*rows), path)
        monkeypatch.setattr(backend_table, "TABLE", path)
        backend_table.forget()

    monkeypatch.setattr(backend_table, "device_name", lambda _: NAME)
    monkeypatch.setattr(backend_table, "versions", lambda: (BARE["triton"], BARE["torch"]))
    yield write
    monkeypatch.undo()
    backend_table.forget()


def chosen(*arguments, **call):
    """By both, which must agree."""
    choice = explain_backend(*arguments, **{"causal": True, **call})
    output = attention(*arguments, **{"causal": True, **call})
    output = output[0] if isinstance(output, tuple) else output
    assert bool((output == 7).all()) == (choice.backend == "made")
    return choice.backend


FASTER, SLOWER = {"made": 1.0, "torch": 2.0}, {"made": 3.0, "torch": 2.0}


def test_auto_takes_what_measured_faster(monkeypatch, table):
    add(monkeypatch, made())
    table(rows_at(64, FASTER))
    assert chosen(*call_of()) == "made"
    choice = explain_backend(*call_of(), causal=True)
    assert choice.reason == f"measured faster than torch at 64 keys on {NAME}."
    assert [each.milliseconds for each in choice.candidates] == [1.0, None, None, 2.0, None]
    assert str(choice).splitlines()[1] == (
        "  made: sevens; 1 ms for B2-Hq4-Hk2-T64-D16 on 2026-01-02"
    )
    table(rows_at(64, SLOWER))
    assert chosen(*call_of()) == "torch"
    table(rows_at(64, {"made": 2.0, "torch": 2.0}))
    assert chosen(*call_of()) == "torch"


@pytest.mark.parametrize(
    "change",
    [
        {"device": "Other GPU"},
        {"triton": "3.6"},
        {"torch": "2.1"},
        {"dtype": "bfloat16"},
        {"head_dim": 32},
        {"value_dim": 32},
        {"mode": "min_shift"},
        {"mode": "plain", "factors": "none"},
        {"factors": "every key and head"},
        {"causal": False},
        {"grouped": False},
        {"direction": "forward + backward"},
        {"queries": 1},
    ],
    ids=str,
)
def test_rows_of_other_calls_say_nothing(monkeypatch, table, change):
    add(monkeypatch, made())
    table(rows_at(64, FASTER, **change), rows_at(64, SLOWER))
    assert chosen(*call_of()) == "torch"
    table(rows_at(64, FASTER, **change))
    assert chosen(*call_of()) == "torch"


@pytest.mark.parametrize(
    "feature",
    [
        {"window": 80},
        {"softcap": 2.0},
        {"sinks": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 1, 1, 64)},
        {"mask": torch.ones(2, 64, dtype=torch.bool)},
        {"prefix": PREFIX},
        {"dropout": 0.1},
        {"query_offset": torch.tensor(0)},
        {"query_offset": 3},
        {"scale": -1.0},
    ],
    ids=lambda feature: next(iter(feature)),
)
def test_calls_with_more_than_was_measured_go_by_the_rule(monkeypatch, table, feature):
    add(monkeypatch, made())
    table(rows_at(64, FASTER))
    assert chosen(*call_of(), **feature) == "torch"
    monkeypatch.setattr(backend_table, "device_name", lambda _: NAME)
    assert next(iter(feature)) in explain_backend(*call_of(), causal=True, **feature).reason


def test_kinds_of_calls_have_rows_of_their_own(monkeypatch, table):
    add(monkeypatch, made())
    query, key, value, factor = call_of()
    per_head = factor[:, None].expand(-1, 4, -1)
    leaf = query.clone().requires_grad_()
    kinds = {
        "per head": ((query, key, value, per_head), {"factors": "every key and head"}),
        "plain": ((query, key, value), {"mode": "plain", "factors": "none"}),
        "backward": ((leaf, key, value, factor), {"direction": "forward + backward"}),
        "one token": ((query[:, :, :1], key, value, factor), {"queries": 1, "causal": False}),
    }
    for name, (arguments, change) in kinds.items():
        table(rows_at(64, FASTER, **change))
        assert chosen(*arguments) == "made", name
        others = [given for other, (given, _) in kinds.items() if other != name]
        assert {chosen(*given) for given in others} == {"torch"}
    table(rows_at(64, FASTER))
    for shared_keys in ((query, key[:1], value, factor), (query, key, value[:1], factor)):
        assert chosen(*shared_keys) == "torch"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(31, "torch"), (32, "made"), (64, "made"), (100, "made"), (128, "made"), (129, "torch"),
     (256, "torch"), (512, "torch"), (513, "torch")],
)  # fmt: skip
def test_both_neighbours_count_and_ends_reach_twice_as_far(monkeypatch, table, tokens, expected):
    add(monkeypatch, made())
    table(rows_at(64, FASTER), rows_at(128, FASTER), rows_at(256, SLOWER))
    assert chosen(*call_of(tokens)) == expected
    table(rows_at(64, SLOWER), rows_at(128, SLOWER), rows_at(256, FASTER))
    assert chosen(*call_of(tokens)) == ("made" if 256 <= tokens <= 512 else "torch")


def test_every_setup_of_a_length_must_agree(monkeypatch, table):
    add(monkeypatch, made())
    wide = {"shape": "B1-Hq8-Hk4-T64-D16"}
    table(rows_at(64, FASTER), rows_at(64, FASTER, **wide))
    assert chosen(*call_of()) == "made"
    table(rows_at(64, FASTER), rows_at(64, SLOWER, **wide))
    assert chosen(*call_of()) == "torch"
    # it could not run there
    table(rows_at(64, FASTER), rows_at(64, {"torch": 2.0}, **wide))
    assert chosen(*call_of()) == "torch"
    # times of different runs are not compared
    table(rows_at(64, {"made": 1.0}), rows_at(64, {"torch": 2.0}, date="2026-01-03"))
    assert chosen(*call_of()) == "torch"


def test_the_fastest_that_serves_is_taken(monkeypatch, table):
    for name in ("slow", "fast", "fastest"):
        serves = {"why_not": lambda _: "is not here"} if name == "fastest" else {}
        add(monkeypatch, made(name, **serves))
    add(monkeypatch, made("oracle", automatic=False))
    table(rows_at(64, {"oracle": 0.1, "fastest": 0.5, "fast": 1.0, "slow": 1.5, "torch": 2.0}))
    assert explain_backend(*call_of(), causal=True).backend == "fast"


def test_on_a_gpu_the_fused_kernels_are_the_rule(table):
    """With tensors that only say that they are on one."""
    fused = {"device": "cuda", "dtype": torch.bfloat16}
    table(rows_at(64, {"triton": 1.0, "torch": 2.0}, dtype="float16"))
    with FakeTensorMode():
        query, key, value = (torch.empty(2, heads, 64, 16, **fused) for heads in (4, 2, 2))
        factor = torch.empty(2, 64, device="cuda")
        arguments = (query, key, value, factor)
        choice = explain_backend(*arguments, causal=True)
        assert (choice.backend, choice.kernel) == ("triton", "forward")
        assert choice.reason.endswith(f"as of a call like this on {NAME}.")
        reason = explain_backend(*arguments, softcap=2.0).reason
        assert reason.endswith(
            "where nothing was measured: calls with softcap are not in the table."
        )
        wide = [torch.empty(2, 2, 64, 320, **fused) for _ in range(3)]
        choice = explain_backend(*wide)
        assert (choice.backend, choice.kernel) == ("torch", "SDPA with a mask")
        assert choice.reason.startswith("triton serves head dims up to 256, got 320, and torch is")
        choice = explain_backend(*arguments, mode="min_shift_full")
        assert (choice.backend, choice.kernel) == ("torch", "query blocks")
        table(rows_at(64, {"triton": 1.0, "torch": 2.0}, dtype="bfloat16"))
        choice = explain_backend(*arguments, causal=True)
        assert choice.backend == "triton"
        assert choice.reason.endswith("on a GPU, where nothing that serves measured faster.")
        table(rows_at(64, {"triton": 3.0, "torch": 2.0}, dtype="bfloat16"))
        choice = explain_backend(*arguments, causal=True)
        assert (choice.backend, choice.kernel) == ("torch", "scaled keys + SDPA")
        table()
        choice = explain_backend(*arguments, causal=True)
        assert choice.backend == "triton" and "nothing was measured, as on Made" in choice.reason


def test_a_table_with_a_broken_line_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    backend_table.write_table(rows_at(64, FASTER), path)
    assert backend_table.read_table(path) == rows_at(64, FASTER)
    text = path.read_text()
    for old, new, complaint in (
        (",1.0,", ",0,", "line 2: milliseconds must be greater than 0, got '0'"),
        (",1.0,", ",fast,", "line 2: milliseconds must be greater than 0, got 'fast'"),
        ("true", "yes", "line 2: causal must be true or false, got 'yes'"),
        (",64,", ",-1,", "line 2: queries must be a number of at least 1, got '-1'"),
        (",forward,", ",back,", "line 2: direction must be 'forward' or 'forward \\+ backward'"),
        (",2026-01-02", ",", "line 2: every column must have a value, got '' in date"),
        (",2026-01-02", "", "line 2: every column must have a value, got None in date"),
        ("device,", "card,", "must have the columns device, triton, .*, got card, triton"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=complaint):
            backend_table.read_table(path)


def test_the_table_that_is_shipped():
    """Every row can be read, and is of a backend that exists."""
    rows = backend_table.read_table()
    assert {row.backend for row in rows} <= {each.name for each in backend_registry.CANDIDATES}


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_auto_compiles_whole(monkeypatch, table, dynamic):
    """With open lengths it goes by the rule, and no guard splits them where the table would."""
    add(monkeypatch, made())
    table(rows_at(64, FASTER), rows_at(128, SLOWER))

    def run(query, key, value, factor):
        return attention(query, key, value, factor, causal=True, query_offset=0)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    lengths = (64, 96, 130)
    sevens = [bool((compiled(*call_of(tokens)) == 7).all()) for tokens in lengths]
    assert sevens == [not dynamic, False, False]
    assert counter.frame_count == (1 if dynamic else len(lengths))
