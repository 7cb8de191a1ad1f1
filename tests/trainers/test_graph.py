"""TF1 graphs: what the driver captures is what a worker runs, number for number.

The graphs are explicit ones: `tf.disable_v2_behavior` is for a whole process, executors never call it.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.errors import FeedError, GraphError
from tensorspark.trainers import base
from tensorspark.trainers.base import Captured, obtain
from tensorspark.trainers.graph import GraphTrainer, tf
from tensorspark.trainers.graph_model import assign, capture
from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer

KINDS = pytest.mark.parametrize("use_resource", [False, True], ids=["ref", "resource"])


@dataclass
class Model:
    """A linear model with Momentum, from weights that are not zero, and its session."""

    graph: Any
    session: Any
    x: Any
    y: Any
    W: Any
    b: Any
    loss: Any
    train: Any
    unfed: Any

    @property
    def feeds(self) -> list[str]:
        return [self.x.name, self.y.name]

    def run(self, fetches: Any, feed_dict: dict[str, Any] | None = None) -> Any:
        with self.graph.as_default():
            return self.session.run(fetches, feed_dict)

    def state(self) -> dict[str, np.ndarray]:
        with self.graph.as_default():
            variables = tf.global_variables()
            return {v.name: value for v, value in zip(variables, self.session.run(variables), strict=True)}

    def capture(self, fetches: Any = None, **changes: Any) -> Captured:
        arguments = {"feed_names": self.feeds, "params": [self.W, self.b]} | changes
        return capture(self.session, self.train if fetches is None else fetches, **arguments)


def _weights(*shape: int, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.5, shape).astype(np.float32)


def _batch(seed: int, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, 3)).astype(np.float32), generator.normal(size=(rows, 2)).astype(np.float32)


def _make(use_resource: bool) -> Model:
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 3], "x")
        y = tf.placeholder(tf.float32, [None, 2], "y")
        w = tf.Variable(_weights(3, 2), name="W", use_resource=use_resource)
        b = tf.Variable(_weights(2), name="b", use_resource=use_resource)
        unfed = tf.Variable(3.0, name="unfed", use_resource=use_resource)
        loss = tf.reduce_mean(tf.square(tf.matmul(x, w) + b - y), name="loss")
        step = tf.train.get_or_create_global_step()
        optimizer = tf.train.MomentumOptimizer(0.1, 0.9)
        train = optimizer.minimize(loss, global_step=step, var_list=[w, b], name="train")
        # Makes a read operation for each, as any use in the graph does.
        tf.identity(unfed)
        session = tf.Session(graph=graph)
        session.run(tf.global_variables_initializer())
        tf.summary.scalar("loss", loss)
    return Model(graph, session, x, y, w, b, loss, train, unfed)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    made = _make(getattr(request, "param", True))
    with made.session:
        yield made


both_kinds = pytest.mark.parametrize("model", [False, True], ids=["ref", "resource"], indirect=True)


@pytest.fixture
def build() -> Iterator[Callable[[Captured], GraphTrainer]]:
    """Builds a trainer as an executor does, out of what travelled."""
    built: list[GraphTrainer] = []

    def from_captured(captured: Captured) -> GraphTrainer:
        trainer = pickle.loads(pickle.dumps(captured.spec)).build(bytes(captured.content))
        trainer.reset()
        trainer.load(captured.weights)
        built.append(trainer)
        return trainer

    yield from_captured
    for trainer in built:
        trainer.close()


@pytest.fixture(autouse=True)
def _empty_process() -> Iterator[None]:
    base._kept.clear()
    yield
    while base._kept:
        base._kept.popitem()[1].close()


def _read(trainer: GraphTrainer) -> dict[str, np.ndarray]:
    out = trainer.layout.allocate()
    trainer.read(out)
    return trainer.layout.views(out)


# There and back


@both_kinds
def test_capture_takes_the_sessions_weights_as_they_are_now(model: Model) -> None:
    for seed in range(3):
        model.run(model.train, dict(zip(model.feeds, _batch(seed), strict=True)))
    state = model.state()
    captured = model.capture()
    assert [(s.name, s.shape, s.dtype) for s in captured.spec.layout.specs] == [
        ("W:0", (3, 2), "float32"),
        ("b:0", (2,), "float32"),
    ]
    for name, view in captured.spec.layout.views(captured.weights).items():
        np.testing.assert_array_equal(view, state[name])
    assert [(c.name, c.shape, c.dtype) for c in captured.spec.columns] == [
        ("x:0", (3,), "float32"),
        ("y:0", (2,), "float32"),
    ]


@both_kinds
def test_loading_then_reading_is_exact(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    trainer = build(model.capture())
    for seed in range(5):
        layout = trainer.layout
        values = {s.name: _weights(*s.shape, seed=seed) for s in layout.specs}
        trainer.load(layout.pack(values))
        for name, view in _read(trainer).items():
            assert view.tobytes() == values[name].tobytes()


@both_kinds
def test_steps_equal_those_of_the_drivers_own_session(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    for seed in range(2):
        model.run(model.train, dict(zip(model.feeds, _batch(seed), strict=True)))
    trainer = build(model.capture([model.train, model.loss]))
    for seed in range(10, 16):
        batch = _batch(seed, rows=1 + seed % 5)
        loss, _ = model.run([model.loss, model.train], dict(zip(model.feeds, batch, strict=True)))
        assert trainer.step(batch) == (pytest.approx(float(loss), rel=1e-6),)
    state = model.state()
    for name, view in _read(trainer).items():
        np.testing.assert_allclose(view, state[name], rtol=1e-6)


@both_kinds
def test_steps_equal_momentum_by_hand(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    trainer = build(model.capture())
    w, b, moment_w, moment_b = _weights(3, 2).astype("f8"), _weights(2).astype("f8"), 0.0, 0.0
    for seed in range(4):
        x, y = _batch(seed)
        trainer.step((x, y))
        slope = 2 * (x @ w + b - y) / y.size
        moment_w, moment_b = 0.9 * moment_w + x.T @ slope, 0.9 * moment_b + slope.sum(axis=0)
        w, b = w - 0.1 * moment_w, b - 0.1 * moment_b
    views = _read(trainer)
    np.testing.assert_allclose(views["W:0"], w, rtol=1e-4)
    np.testing.assert_allclose(views["b:0"], b, rtol=1e-4)


@both_kinds
def test_reset_sets_slots_and_counters_to_the_drivers_values(
    model: Model, build: Callable[[Captured], GraphTrainer]
) -> None:
    for seed in range(3):
        model.run(model.train, dict(zip(model.feeds, _batch(seed), strict=True)))
    captured = model.capture([model.train, {"unfed": model.unfed}])
    trainer = build(captured)
    counter = tf.train.get_global_step(model.graph).name

    def train() -> tuple[list[tuple[float, ...]], list[bytes]]:
        assert trainer._variables.read([counter])[counter] == 3
        scalars = [trainer.step(_batch(seed)) for seed in (20, 21, 22)]
        assert trainer._variables.read([counter])[counter] == 6
        trainer_weights = [view.tobytes() for view in _read(trainer).values()]
        trainer.reset()
        return scalars, trainer_weights

    first = train()
    assert first[1] != train()[1], "weights must have moved for this to show anything"
    trainer.load(captured.weights)
    assert train() == first
    assert first[0][0] == (3.0,)


@both_kinds
def test_assign_sets_the_drivers_variables_and_no_others(model: Model) -> None:
    model.run(model.train, dict(zip(model.feeds, _batch(1), strict=True)))
    captured, before = model.capture(), model.state()
    layout = captured.spec.layout
    values = {s.name: _weights(*s.shape, seed=77) for s in layout.specs}
    weights = layout.pack(values)
    assign(model.session, layout, weights)
    weights[...] = 0xFF
    for name, value in model.state().items():
        np.testing.assert_array_equal(value, values.get(name, before[name]))


@KINDS
def test_variables_that_share_their_initial_value_are_set_apart(
    use_resource: bool, build: Callable[[Captured], GraphTrainer]
) -> None:
    """Two initializers then assign one and the same tensor: to feed it sets both."""
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], "x")
        zeros = tf.zeros([3])
        variables = [tf.Variable(zeros, name=name, use_resource=use_resource) for name in "abcd"]
        total = tf.add_n([tf.reduce_sum(v * factor) for v, factor in zip(variables, (1, 10, 100, 1000), strict=True)])
        fetch = tf.add(total, 0 * tf.reduce_sum(x), name="total")
        session.run(tf.global_variables_initializer())
        for number, variable in enumerate(variables, 1):
            session.run(tf.assign(variable, [float(number), 0.0, 0.0]))
        captured = capture(session, fetch, ["x"], variables[:2])
        trainer = build(captured)
        assert trainer.step((np.ones(2, np.float32),)) == (4321.0,)
        layout = captured.spec.layout
        assign(session, layout, layout.pack({"a:0": np.full(3, 5, "f4"), "b:0": np.full(3, 6, "f4")}))
        values = [value.tolist() for value in session.run(variables)]
        assert values == [[5.0] * 3, [6.0] * 3, [3.0, 0.0, 0.0], [4.0, 0.0, 0.0]]


@KINDS
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "int64", "int8"])
def test_variables_of_many_dtypes_and_shapes_travel(
    use_resource: bool, dtype: str, build: Callable[[Captured], GraphTrainer]
) -> None:
    kind = tf.as_dtype(dtype)
    values = {f"{prefix}{i}:0": np.full(shape, 3 + i).astype(kind.as_numpy_dtype)
              for prefix in ("shared", "local") for i, shape in enumerate([(), (4,), (2, 3), (0, 2)])}  # fmt: skip
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], "x")
        for name, value in values.items():
            tf.identity(tf.Variable(value, name=name[:-2], use_resource=use_resource))
        local = tf.add_n([tf.reduce_sum(tf.cast(v, tf.float32)) for v in tf.global_variables() if "local" in v.name])
        session.run(tf.global_variables_initializer())
        captured = capture(session, local + 0 * tf.reduce_sum(x), ["x"], [n for n in values if "shared" in n])
    trainer = build(captured)
    assert trainer.step((np.ones(1, np.float32),)) == (3.0 + 4 * 4 + 6 * 5,)
    for name, view in _read(trainer).items():
        assert view.dtype == values[name].dtype
        assert view.tobytes() == values[name].tobytes()


# The aliasing trap


@KINDS
@pytest.mark.parametrize("num_elements", [1, 16, 1000, 1 << 18])
@pytest.mark.parametrize("through", ["trainer", "assign", "reset"])
def test_overwriting_a_buffer_after_it_was_loaded_changes_no_model(
    use_resource: bool, num_elements: int, through: str, build: Callable[[Captured], GraphTrainer]
) -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], "x")
        v = tf.Variable(np.full(num_elements, 2, np.float32), name="v", use_resource=use_resource)
        fetch = tf.reduce_max(v) + 0 * tf.reduce_sum(x)
        session.run(tf.global_variables_initializer())
        captured = capture(session, [fetch, v], ["x"], [v])
        layout = captured.spec.layout
        trainer = build(captured)
        buffer: Buffer = layout.pack({"v:0": np.full(num_elements, 7, np.float32)})
        assert buffer.ctypes.data % ALIGNMENT_BYTES == 0
        if through == "assign":
            assign(session, layout, buffer)
        elif through == "reset":
            trainer._variables.load(layout.views(buffer))
        else:
            trainer.load(buffer)
        layout.views(buffer)["v:0"][...] = -1
        if through == "assign":
            np.testing.assert_array_equal(session.run(v), np.full(num_elements, 7, np.float32))
        else:
            np.testing.assert_array_equal(_read(trainer)["v:0"], np.full(num_elements, 7, np.float32))
            assert trainer.step((np.ones(1, np.float32),))[0] == 7.0


@both_kinds
def test_training_does_not_write_into_buffers_that_were_loaded_or_read(
    model: Model, build: Callable[[Captured], GraphTrainer]
) -> None:
    captured = model.capture()
    trainer = build(captured)
    loaded, out = captured.weights.copy(), trainer.layout.allocate()
    trainer.read(out)
    read = out.copy()
    for seed in range(3):
        trainer.step(_batch(seed))
    np.testing.assert_array_equal(captured.weights, loaded)
    np.testing.assert_array_equal(out, read)
    assert _read(trainer)["W:0"].tobytes() != trainer.layout.views(out)["W:0"].tobytes()


# What is fetched


FETCHES: dict[str, tuple[Callable[[Model], Any], tuple[str, ...]]] = {
    "operation": (lambda m: m.train, ()),
    "operation's name": (lambda m: "train", ()),
    "tensor": (lambda m: m.loss, ("loss:0",)),
    "tensor's name": (lambda m: "loss:0", ("loss:0",)),
    "list": (lambda m: [m.train, m.loss], ("loss:0",)),
    "tuple": (lambda m: (m.loss, m.train), ("loss:0",)),
    "dict": (lambda m: {"train": m.train, "error": m.loss}, ("error",)),
    "list of dicts": (lambda m: [m.train, {"error": m.loss}], ("error",)),
    "dict of lists": (lambda m: {"all": [m.train, m.loss]}, ("all/1",)),
    "dict of dicts": (lambda m: {"train": m.train, "of": {"x": m.loss, "y": "loss:0"}}, ("of/x", "of/y")),
    "no scalar": (lambda m: [m.train, "MatMul:0"], ()),
    "variable": (lambda m: [m.train, m.loss, m.W], ("loss:0",)),
    "twice": (lambda m: [m.loss, m.loss, m.train, m.train], ("loss:0",)),
}


@pytest.mark.parametrize(("fetches", "names"), FETCHES.values(), ids=list(FETCHES))
def test_fetches_come_in_every_form_of_session_run_and_scalars_are_named(
    model: Model, build: Callable[[Captured], GraphTrainer], fetches: Callable[[Model], Any], names: tuple[str, ...]
) -> None:
    trainer = build(model.capture(fetches(model)))
    assert trainer.scalar_names == names
    x, y = _batch(5)
    before = _read(trainer)
    loss = np.mean(np.square(x @ before["W:0"] + before["b:0"] - y))
    assert trainer.step((x, y)) == pytest.approx((loss,) * len(names), rel=1e-5)
    trains = "train" in str(fetches(model))
    assert (_read(trainer)["W:0"].tobytes() != before["W:0"].tobytes()) is trains


@pytest.mark.parametrize("keep", [0.5, 1, np.float64(0.25)])
def test_constants_are_fed_with_every_batch(keep: float, build: Callable[[Captured], GraphTrainer]) -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], "x")
        keep_prob = tf.placeholder(tf.float32, [], "keep_prob")
        v = tf.Variable(2.0, name="v")
        dropped = tf.nn.dropout(tf.ones([20_000]) * v, rate=1 - keep_prob)
        zero = 0 * tf.reduce_sum(x)
        fetches = {"kept": tf.reduce_mean(tf.cast(dropped > 0, tf.float32)) + zero, "max": tf.reduce_max(dropped)}
        session.run(tf.global_variables_initializer())
        trainer = build(capture(session, fetches, ["x"], [v], constants={"keep_prob:0": keep}))
    for rows in (1, 5):
        kept, largest = trainer.step((np.ones(rows, np.float32),))
        assert kept == pytest.approx(float(keep), abs=0.02)
        assert largest == pytest.approx(2 / float(keep))


def test_what_is_fed_may_be_fetched_as_in_session_run(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    trainer = build(model.capture([model.train, model.loss, model.x]))
    assert len(trainer.step(_batch(1))) == 1


def test_run_options_are_taken(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    trainer = build(model.capture(options=tf.RunOptions(timeout_in_ms=60_000), constants={}))
    before = _read(trainer)["W:0"].tobytes()
    trainer.step(_batch(1))
    assert _read(trainer)["W:0"].tobytes() != before


def test_a_column_of_strings_reaches_the_graph(build: Callable[[Captured], GraphTrainer]) -> None:
    from tensorspark.data.decoders import RowDecoder
    from tensorspark.data.feed import PartitionFeed
    from tensorspark.data.spill import EpochCache

    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        words = tf.placeholder(tf.string, [None], "words")
        v = tf.Variable(1.0, name="v")
        fetch = v * tf.cast(tf.reduce_sum(tf.strings.length(words)), tf.float32)
        session.run(tf.global_variables_initializer())
        captured = capture(session, fetch, ["words"], [v])
    trainer = build(captured)
    with EpochCache(2**20, "/nonexistent") as cache:
        feed = PartitionFeed(["abc", "de"], RowDecoder(captured.spec.columns), partition=0, batch_size=8, num_epochs=1,
                             shuffle=False, seed=0, cache=cache)  # fmt: skip
        stretch = feed.take(1)
        assert stretch is not None
        assert trainer.train(stretch.columns, 8).tolist() == [2 * 5.0]


def test_columns_know_free_sizes(model: Model) -> None:
    with model.graph.as_default():
        tf.placeholder(tf.int32, [None, None, 4], "free")
        tf.placeholder(tf.string, None, "any")
    columns = model.capture(feed_names=["free", "any:0"]).spec.columns
    assert [(c.name, c.shape, c.dtype) for c in columns] == [
        ("free:0", (None, 4), "int32"),
        ("any:0", None, "object"),
    ]


# The driver's graph and session


@both_kinds
def test_capture_and_assign_leave_a_finalized_graph_and_the_session_as_they_are(model: Model) -> None:
    with model.graph.as_default():
        tf.placeholder(tf.float32, [], "c")
    model.graph.finalize()
    before, state = model.graph.as_graph_def(), model.state()
    captured = model.capture([model.train, {"loss": model.loss}], constants={"c:0": 1.0})
    assign(model.session, captured.spec.layout, captured.weights)
    assert model.graph.as_graph_def() == before
    for name, value in model.state().items():
        np.testing.assert_array_equal(value, state[name])


def test_a_trainer_lives_in_a_graph_of_its_own(model: Model, build: Callable[[Captured], GraphTrainer]) -> None:
    default = tf.get_default_graph()
    num_operations = len(default.get_operations())
    captured, before = model.capture(), model.state()
    trainer = build(captured)
    trainer.step(_batch(1))
    assert tf.get_default_graph() is default
    assert len(default.get_operations()) == num_operations
    for name, value in model.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_variable_nobody_initialized_is_no_obstacle_unless_it_is_synchronized(
    model: Model, build: Callable[[Captured], GraphTrainer]
) -> None:
    with model.graph.as_default():
        late = tf.Variable(1.0, name="late")
    trainer = build(model.capture())
    trainer.step(_batch(1))
    with pytest.raises(GraphError, match=r"late:0 is not initialized"):
        model.capture(params=[model.W, late])


# What is refused


BAD_PARAMS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "none": (lambda m: [], "param_list is empty"),
    "unknown name": (lambda m: ["nothere"], r"nothere:0, which is no variable.*W:0.*b:0"),
    "a tensor": (lambda m: [m.loss], r"loss:0, which is no variable"),
    "twice": (lambda m: [m.W, "W"], r"W:0 twice"),
    "a number": (lambda m: [m.W, 5], r"param_list holds 5"),
    "nothing": (lambda m: [None], r"param_list holds None"),
    "another graph's": (lambda m: [_make(True).W], r"W:0 belongs to another graph"),
    "a string variable": (lambda m: ["text"], r"text:0.*|param_list cannot be synchronized"),
    "a switch": (lambda m: ["switch"], r"switch:0.*|param_list cannot be synchronized"),
}


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS.values(), ids=list(BAD_PARAMS))
def test_parameters_that_cannot_be_synchronized_are_refused_by_name(
    model: Model, params: Callable[[Model], Any], message: str
) -> None:
    with model.graph.as_default():
        switches = [tf.Variable("hello", name="text"), tf.Variable(True, name="switch")]
        model.session.run([variable.initializer for variable in switches])
    with pytest.raises(GraphError, match=message):
        model.capture(params=params(model))


BAD_FETCHES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "unknown operation": (lambda m: "nothere", "nothere"),
    "unknown tensor": (lambda m: [m.train, "nothere:0"], "nothere:0"),
    "second output": (lambda m: "loss:1", "loss:1"),
    "another graph's": (lambda m: _make(True).train, "not in the session's graph"),
    "a number": (lambda m: [m.train, 5], "fetch 5"),
    "nothing in it": (lambda m: [m.train, None], "fetch None"),
    "an empty list": (lambda m: [], "fetches is empty"),
    "an empty dict": (lambda m: {}, "fetches is empty"),
}


@pytest.mark.parametrize(("fetches", "message"), BAD_FETCHES.values(), ids=list(BAD_FETCHES))
def test_fetches_that_are_not_in_the_graph_are_refused(
    model: Model, fetches: Callable[[Model], Any], message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        model.capture(fetches(model))


BAD_FEEDS: dict[str, tuple[list[Any], str]] = {
    "unknown": (["x:0", "labels:0"], r"'labels:0'.*placeholders are x:0, y:0"),
    "unknown, short": (["labels"], r"'labels'.*placeholders are x:0, y:0"),
    "second output": (["x:1"], r"'x:1'"),
    "twice": (["x:0", "y:0", "x:0"], r"x:0 twice"),
    "twice in two forms": (["x:0", "y:0", "x"], r"x(:0)? twice"),
    "no batch dimension": (["scalar"], r"scalar.*expected None as its first dimension"),
    "a fixed batch": (["fixed:0"], r"fixed:0.*expected None as its first dimension"),
    "nothing": ([None], r"None"),
    "a number": ([5], r"5"),
}


@pytest.mark.parametrize(("names", "message"), BAD_FEEDS.values(), ids=list(BAD_FEEDS))
def test_feeds_that_cannot_take_a_batch_are_refused_by_name(model: Model, names: list[Any], message: str) -> None:
    if names[0] in ("scalar", "fixed:0"):
        with model.graph.as_default():
            tf.placeholder(tf.float32, [], "scalar")
            tf.placeholder(tf.float32, [8, 3], "fixed")
    with pytest.raises(FeedError, match=message):
        model.capture(feed_names=names)


def test_a_constant_that_is_not_in_the_graph_is_refused_by_name(model: Model) -> None:
    with pytest.raises(FeedError, match="keep_prob:0"):
        model.capture(constants={"keep_prob:0": 0.5})


def test_a_constant_that_is_also_in_the_rows_is_refused_by_name(model: Model) -> None:
    with pytest.raises(FeedError, match="y:0"):
        model.capture(constants={"y:0": np.ones((6, 2), np.float32)})


def test_a_constant_that_does_not_fit_its_tensor_is_refused_on_the_driver(model: Model) -> None:
    with model.graph.as_default():
        tf.placeholder(tf.float32, [2], "scale")
    for value in ([1.0, 2.0, 3.0], "a", None):
        with pytest.raises(FeedError, match="scale:0"):
            model.capture(constants={"scale:0": value})


def test_reading_a_resource_variable_runs_nothing_else() -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], name="x")
        count = tf.Variable(0.0, use_resource=True, name="count")
        v = tf.Variable(1.0, use_resource=True, name="v")
        for _ in range(50):
            with tf.control_dependencies([count.assign_add(1.0)]):
                count.read_value()
        train = tf.assign_add(v, tf.reduce_sum(x)).op
        session.run(tf.global_variables_initializer())
        for _ in range(3):
            captured = capture(session, train, ["x:0"], [count, v])
        assert session.run(count) == 0
        trainer = captured.spec.build(captured.content)
        trainer.load(captured.weights)
        out = trainer.layout.allocate()
        for _ in range(3):
            trainer.read(out)
        assert trainer.layout.views(out)["count:0"] == 0
        trainer.close()


# One trainer per process


def test_obtain_builds_once_and_what_is_reset_trains_the_same_again(model: Model) -> None:
    captured = model.capture([model.train, model.loss])
    fetched: list[int] = []

    def content() -> bytes:
        fetched.append(1)
        return captured.content

    runs = []
    trainers = [obtain(pickle.loads(pickle.dumps(captured.spec)), content) for _ in range(3)]
    assert len(fetched) == 1
    assert trainers[0] is trainers[1] is trainers[2]
    for _ in range(3):
        trainer = obtain(captured.spec, content)
        trainer.reset(partition=0, seed=0)
        trainer.load(captured.weights)
        runs.append([trainer.step(_batch(seed)) for seed in range(3)])
    assert runs[0] == runs[1] == runs[2]
    assert len(fetched) == 1


def test_the_collector_passes_over_what_was_imported_and_not_over_trainers(model: Model) -> None:
    captured = model.capture()
    trainer = obtain(captured.spec, lambda: captured.content)
    assert gc.get_freeze_count() > 100_000
    assert any(found is trainer for found in gc.get_objects())


def test_obtain_tells_apart_whatever_would_run_otherwise(model: Model) -> None:
    with model.graph.as_default():
        tf.placeholder(tf.float32, [], "c")
    captures = [
        model.capture(),
        model.capture(model.loss),
        model.capture({"other": model.loss}),
        model.capture(params=[model.W]),
        model.capture(params=[model.b, model.W]),
        model.capture(feed_names=["y:0", "x:0"]),
        model.capture(constants={"c:0": 0.5}),
        model.capture(constants={"c:0": 0.25}),
        model.capture(num_threads=2),
        model.capture(options=tf.RunOptions(timeout_in_ms=5)),
    ]
    model.run(model.train, dict(zip(model.feeds, _batch(1), strict=True)))
    captures.append(model.capture())
    assert len({captured.spec.key for captured in captures}) == len(captures)
    assert captures[-1].spec.key == model.capture().spec.key


def test_weights_that_travel_apart_do_not_make_another_trainer(model: Model) -> None:
    first = model.capture()
    layout = first.spec.layout
    assign(model.session, layout, layout.pack({s.name: _weights(*s.shape, seed=9) for s in layout.specs}))
    second = model.capture()
    assert second.spec.key == first.spec.key
    assert second.weights.tobytes() != first.weights.tobytes()


def test_obtain_keeps_a_few_trainers_and_closes_the_one_unused_longest(model: Model) -> None:
    captures = [model.capture({f"loss {number}": model.loss, "train": model.train}) for number in range(5)]
    first = obtain(captures[0].spec, lambda: captures[0].content)
    second = obtain(captures[1].spec, lambda: captures[1].content)
    obtain(captures[0].spec, lambda: captures[0].content)
    for captured in captures[2:]:
        obtain(captured.spec, lambda captured=captured: captured.content)
    assert obtain(captures[0].spec, lambda: pytest.fail("it was used lately")) is first
    with pytest.raises(tf.errors.CancelledError, match="closed"):
        second.step(_batch(1))


# Threads


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (3, 3)),
        (tf.ConfigProto(), (3, 3)),
        (tf.ConfigProto(intra_op_parallelism_threads=7), (7, 3)),
        (tf.ConfigProto(inter_op_parallelism_threads=5), (3, 5)),
        (tf.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=4), (2, 4)),
    ],
    ids=["none", "empty", "intra", "inter", "both"],
)
def test_threads_that_the_config_leaves_open_are_those_of_the_task(
    model: Model, config: Any, expected: tuple[int, int]
) -> None:
    before = None if config is None else config.SerializeToString()
    sent = tf.ConfigProto.FromString(model.capture(config=config, num_threads=3).spec.config)
    assert (sent.intra_op_parallelism_threads, sent.inter_op_parallelism_threads) == expected
    assert before is None or config.SerializeToString() == before


def test_other_options_of_the_config_travel(model: Model) -> None:
    config = tf.ConfigProto(allow_soft_placement=True, device_count={"GPU": 0})
    sent = tf.ConfigProto.FromString(model.capture(config=config).spec.config)
    assert sent.allow_soft_placement
    assert dict(sent.device_count) == {"GPU": 0}
