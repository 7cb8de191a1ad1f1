// The keyboard: what the help lists.

const SECTIONS = ["training", "speed", "timeline", "workers", "weights", "network", "checkpoints", "events", "configuration"];

export function listen() {
  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  help.addEventListener("click", (event) => { if (event.target === help) help.close(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open || takesText(event.target)) return;
    if (act(event.key, help)) event.preventDefault();
  });
  for (const link of document.querySelectorAll(".sections a, .skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      goTo(link.hash.slice(1));
    });
  }
}

function takesText(element) {
  return element instanceof HTMLSelectElement || element instanceof HTMLTextAreaElement
    || (element instanceof HTMLInputElement && !["radio", "checkbox"].includes(element.type));
}

function act(key, help) {
  if (key >= "1" && key <= "9") goTo(SECTIONS[Number(key) - 1]);
  else if (key === "?") help.showModal();
  else if (key === "x") document.querySelector("input[name=axis]:not(:checked)").click();
  else if (key === "l") document.getElementById("log").click();
  else if (key === "p") document.getElementById("pause").click();
  else return false;
  return true;
}

function goTo(section) {
  const title = document.getElementById(`${section}-title`);
  title.focus({ preventScroll: true });
  document.getElementById(section).scrollIntoView({ block: "start" });
  history.replaceState(null, "", `#${section}`);
}
