// All that the page knows of the run: frames are added to it.

const KEPT_SPANS = 20000;
const KEPT_SPANS_S = 150;
const KEPT_LINES = 500;

function blank() {
  return {
    run: null,
    state: null,
    points: { seconds: [], steps: [], scalars: {} },
    paces: {},
    norms: { seconds: [], steps: [], weights: [], updates: [] },
    weights: null,
    epochs: [],
    rows: [],
    spans: [],
    table: [],
    workers: new Map(),
    events: [],
    logs: [],
    checkpoints: [],
  };
}

export const store = blank();

/** Adds a frame; returns the names of what it has changed. */
export function apply(frame) {
  if (frame.full) {
    Object.assign(store, blank(), { run: frame.run });
  }
  if (frame.state) store.state = frame.state;
  if (frame.points) addPoints(frame.points);
  if (frame.paces) addColumns(store.paces, frame.paces);
  if (frame.norms) addNorms(frame.norms);
  if (frame.weights) store.weights = frame.weights;
  if (frame.table) store.table = frame.table;
  for (const row of frame.workers ?? []) store.workers.set(row[0], row);
  for (const name of ["epochs", "events", "logs", "checkpoints"]) {
    if (frame[name]) store[name] = store[name].concat(frame[name]).slice(name === "epochs" ? 0 : -KEPT_LINES);
  }
  if (frame.timeline) addTimeline(frame.timeline);
}

function addColumns(columns, part) {
  for (const [name, values] of Object.entries(part)) {
    if (Array.isArray(values)) columns[name] = joined(columns[name] ?? [], values, part.all);
  }
}

// Where the values are not all there are, the first of them is the last one that is known, which may have grown.
function joined(known, values, all) {
  if (all) return values;
  const kept = known.slice(0, -1);
  for (const value of values) kept.push(value);
  return kept;
}

function addPoints(part) {
  const { points } = store;
  const before = part.all ? 0 : Math.max(points.seconds.length - 1, 0);
  const added = part.seconds.length;
  if (!part.all && !added) return;
  points.seconds = joined(points.seconds, part.seconds, part.all);
  points.steps = joined(points.steps, part.steps, part.all);
  const names = new Set([...(part.all ? [] : Object.keys(points.scalars)), ...Object.keys(part.scalars)]);
  const scalars = {};
  for (const name of names) {
    const known = (part.all ? [] : points.scalars[name] ?? Array(before).fill(null)).slice(0, before);
    scalars[name] = known.concat(part.scalars[name] ?? Array(added).fill(null));
  }
  points.scalars = scalars;
}

function addNorms(part) {
  if (!part.all && !part.seconds.length) return;
  const { norms } = store;
  norms.seconds = joined(norms.seconds, part.seconds, part.all);
  norms.steps = joined(norms.steps, part.steps, part.all);
  for (const kind of ["weights", "updates"]) {
    norms[kind] = part[kind].map((values, index) => joined(norms[kind][index] ?? [], values, part.all));
  }
}

function addTimeline(part) {
  const shown = new Set(part.rows);
  const newcomers = new Set(part.newcomers ?? []);
  const since = (store.state?.seconds ?? 0) - KEPT_SPANS_S;
  const kept = store.spans.filter(
    (span) => shown.has(span.partition) && !newcomers.has(span.partition) && span.end > since,
  );
  const { partition, activity, seconds, duration_s, is_sum, waited_for } = part.spans;
  for (let i = 0; i < partition.length; i++) {
    kept.push({
      partition: partition[i],
      activity: activity[i],
      start: seconds[i],
      end: seconds[i] + duration_s[i],
      isSum: is_sum[i] === 1,
      waitedFor: waited_for[i],
    });
  }
  store.spans = kept.slice(-KEPT_SPANS);
  store.rows = part.rows;
}
