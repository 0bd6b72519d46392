// Stored times are UTC, people read their own; tables that go on to the right say so. Without this script the page says
// UTC, and a shadow at its edge tells where a table goes on.
"use strict";
const HERE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.title = time.textContent;
    time.textContent = HERE.format(new Date(time.dateTime));
  }
}

function hints() {
  for (const hint of document.querySelectorAll(".scroll-hint")) {
    const table = hint.nextElementSibling;
    hint.classList.toggle("on", Boolean(table) && table.scrollWidth > table.clientWidth + 1);
  }
}

localTimes(document);
hints();
addEventListener("resize", hints);
for (const live of document.querySelectorAll("#live")) {
  new MutationObserver((changes) => {
    for (const change of changes) for (const node of change.addedNodes) if (node.querySelectorAll) localTimes(node);
    hints();
  }).observe(live, { childList: true, subtree: true });
}
