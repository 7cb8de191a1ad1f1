// How numbers, times and bytes are written, everywhere on the page.

const PREFIXES = ["", "k", "M", "G", "T", "P"];

/** A number of any size in few characters: 0.01234, 12.3, 1.23k, 45.6M; "–" for none. */
export function si(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  if (size < 1000) return trimmed(value, digits);
  let power = Math.min(Math.floor(Math.log10(size) / 3), PREFIXES.length - 1);
  if (Number(Math.abs(value / 1000 ** power).toPrecision(digits)) >= 1000) power += 1;
  return `${trimmed(value / 1000 ** power, digits)}${PREFIXES[power] ?? "E"}`;
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

/** A count in full: 12,345. */
export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

/** Bytes with a unit: 12.3 MB. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const text = si(value);
  const unit = /[a-zA-Z]$/.test(text) ? text.slice(-1) : "";
  return `${unit ? text.slice(0, -1) : text} ${unit}B`;
}

/** A time since the run began, or a length: 1:05, 1:02:05, 3d 04:05:06. */
export function clock(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  const sign = seconds < 0 ? "−" : "";
  const whole = Math.floor(Math.abs(seconds) + 1e-6);
  const [s, m, h] = [whole % 60, Math.floor(whole / 60) % 60, Math.floor(whole / 3600)];
  const two = (number) => String(number).padStart(2, "0");
  if (h >= 48) return `${sign}${Math.floor(h / 24)}d ${two(h % 24)}:${two(m)}:${two(s)}`;
  return h ? `${sign}${h}:${two(m)}:${two(s)}` : `${sign}${m}:${two(s)}`;
}

/** A short length of time: 830 µs, 12 ms, 1.25 s, 2:05. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 100) return clock(seconds);
  if (seconds >= 1) return `${trimmed(seconds, 3)} s`;
  if (seconds >= 1e-3) return `${trimmed(seconds * 1e3, 3)} ms`;
  return `${Math.round(seconds * 1e6)} µs`;
}

/** A share: 12%; what is little but there is not 0%. */
export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  if (share > 0 && share < 0.005) return "<1%";
  return `${Math.round(share * 100)}%`;
}

/** Like `si`, as precise as a metric is read. */
export function metric(value) {
  return si(value, 4);
}

/** "1 worker", "3 workers". */
export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** "0, 1, 2 and 5 more". */
export function listed(values, limit = 6) {
  const some = values.slice(0, limit).join(", ");
  return values.length > limit ? `${some} and ${values.length - limit} more` : some;
}
