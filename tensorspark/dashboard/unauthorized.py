"""The page of who came without the run's token: says where to find the address that has it."""

from __future__ import annotations

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Token needed · tensorspark</title>
<style>
  :root { --page: #f4f6f9; --card: #fff; --text: #17202c; --muted: #516074; --line: #d9e0e8; --accent: #0a5fb4; }
  @media (prefers-color-scheme: dark) {
    :root { --page: #0e141c; --card: #161e29; --text: #e8edf4; --muted: #a3b0c2; --line: #2b3746; --accent: #7ab8ff; }
  }
  body { margin: 0; min-height: 100vh; display: grid; grid-template-columns: minmax(0, 1fr); place-items: center;
         background: var(--page); color: var(--text);
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
  main { box-sizing: border-box; width: min(40rem, 100%); padding: clamp(1.25rem, 5vw, 2.5rem); background: var(--card);
         border: 1px solid var(--line); border-radius: 12px; }
  .code { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .02em; }
  h1 { margin: .25rem 0 1rem; font-size: 1.5rem; line-height: 1.25; }
  li { margin: .5rem 0; }
  ul { padding-left: 1.25rem; }
  code, pre { font: .9em/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
  pre { overflow-x: auto; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
  p:last-child { margin-bottom: 0; color: var(--muted); }
</style>
</head>
<body>
<main>
  <p class="code">401 · not authorized</p>
  <h1>This page needs the run’s token</h1>
  <p>The address was opened without a token, or with that of another run. Open it as it was printed, token included:</p>
  <pre>http://HOST:PORT/dashboard?token=…</pre>
  <ul>
    <li>It was printed when the run began, where the program was started: look in the terminal, in the notebook, or in
      the driver’s log for a line with <code>/dashboard?token=</code>.</li>
    <li>In the program, the <code>History</code> that training returns shows it too.</li>
    <li>For a replay, <code>tensorspark dashboard --replay</code> printed it.</li>
  </ul>
  <p>Each run has a token of its own. One that is pasted into the address is kept as a cookie of this browser until the
    browser closes, so it is needed once only.</p>
</main>
</body>
</html>
"""


def page() -> str:
    """The page, as HTML that needs nothing else: no script, no image, no other file."""
    return _PAGE
