// Fetches the live part of the page every few seconds and replaces what changed, unless somebody is at it.
"use strict";
const live = document.getElementById("live");
const EVERY_MS = 3000;
const seen = new Map(); // what the backend sent last for a part: other scripts change it here

async function refresh() {
  if (document.hidden) return;
  let answer;
  try {
    answer = await fetch(live.dataset.url, { credentials: "same-origin" });
  } catch {
    return; // the backend restarts or the network is gone: the next try tells
  }
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of live.querySelectorAll("[data-part]")) {
    const next = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
    const busy = part.contains(document.activeElement) || part.querySelector("details[open]");
    if (next && !busy && next.innerHTML !== seen.get(part)) {
      seen.set(part, next.innerHTML);
      const log = part.querySelector(".log");
      part.replaceChildren(...next.childNodes);
      if (log) scrollLog();
    }
  }
}

function scrollLog() {
  const log = live.querySelector(".log");
  if (log) log.scrollTop = log.scrollHeight;
}

live.addEventListener("submit", once);
function once(event) {
  const pressed = event.target.querySelector("button");
  pressed.disabled = true;
  pressed.textContent = "…";
}

scrollLog();
setInterval(refresh, EVERY_MS);
