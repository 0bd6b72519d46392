// Draws the map of the pool and tells what is pointed at. The list beside it says the same without this script.
"use strict";
const map = document.getElementById("map");
const canvas = map.querySelector("canvas");
const pen = canvas.getContext("2d");
const shown = map.querySelector(".shown");
const MARGIN = 16;
const REACH = 14;
const SIZE = 6.5; // from the middle to the tips of a chosen image's mark
const HOVER_MS = 70;
const ORDER = ["r", "c", "l", "s", "p"]; // what is drawn later lies on top
const COLOURS = Object.fromEntries(ORDER.map((kind) => [kind, colourOf(kind)]));
const NAMES = { r: "the rest", c: "also worth it", l: "labelled before", s: "labelled since", p: "next to label" };

let points = null;
let byTask = new Map();
let places = []; // index of the point at each place of the queue
let at = []; // x, y in CSS pixels, two numbers a point
let picked = -1;
let waiting = 0;

function colourOf(kind) {
  const icon = map.querySelector(`.icon.${kind}`);
  return icon ? getComputedStyle(icon).getPropertyValue("--point").trim() : "#75838d";
}

function visible() {
  return new Set([...map.querySelectorAll(".layers input:checked")].map((box) => box.value));
}

async function start() {
  const told = map.querySelector(".waiting");
  let answer;
  try {
    answer = await fetch(map.dataset.points, { credentials: "same-origin" });
  } catch {
    told.textContent = "The points could not be fetched; the list has what is chosen.";
    return;
  }
  if (!answer.ok) {
    told.textContent = "The points of the map are gone; the list has what is chosen.";
    return;
  }
  points = await answer.json();
  points.ids.forEach((task, index) => byTask.set(task, index));
  points.place.forEach((place, index) => { if (place) places[place] = index; });
  places = places.filter((index) => index !== undefined);
  told.remove();
  lay();
  new ResizeObserver(lay).observe(canvas);
  map.dataset.ready = "yes";
}

function lay() {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < points.ids.length; i++) {
    left = Math.min(left, points.x[i]);
    right = Math.max(right, points.x[i]);
    low = Math.min(low, points.y[i]);
    high = Math.max(high, points.y[i]);
  }
  // One scale for both axes: a distance means the same in every direction.
  const scale = Math.min((width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (high - low || 1));
  at = new Float32Array(2 * points.ids.length);
  for (let i = 0; i < points.ids.length; i++) {
    at[2 * i] = width / 2 + (points.x[i] - (left + right) / 2) * scale;
    at[2 * i + 1] = height / 2 - (points.y[i] - (low + high) / 2) * scale;
  }
  draw();
}

function draw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const layers = visible();
  for (const kind of ORDER) {
    if (!layers.has(kind)) continue;
    pen.fillStyle = pen.strokeStyle = COLOURS[kind];
    for (let i = 0; i < points.ids.length; i++) {
      if (points.kinds[i] === kind) mark(kind, at[2 * i], at[2 * i + 1]);
    }
  }
  if (picked >= 0) {
    pen.strokeStyle = "#1c2730";
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(at[2 * picked], at[2 * picked + 1], 11, 0, 2 * Math.PI);
    pen.stroke();
  }
}

function mark(kind, x, y) {
  pen.lineWidth = 1.6;
  if (kind === "r") {
    pen.fillRect(x - 1.5, y - 1.5, 3, 3);
  } else if (kind === "c") {
    pen.beginPath();
    pen.arc(x, y, 3.4, 0, 2 * Math.PI);
    pen.stroke();
  } else if (kind === "l") {
    pen.fillRect(x - 3, y - 3, 6, 6);
  } else if (kind === "s") {
    pen.strokeRect(x - 3.5, y - 3.5, 7, 7);
  } else {
    pen.beginPath();
    pen.moveTo(x, y - SIZE);
    pen.lineTo(x + SIZE, y);
    pen.lineTo(x, y + SIZE);
    pen.lineTo(x - SIZE, y);
    pen.closePath();
    pen.fill();
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1;
    pen.stroke();
    pen.strokeStyle = COLOURS[kind];
  }
}

function nearest(event) {
  const box = canvas.getBoundingClientRect(), layers = visible();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = REACH * REACH;
  for (let i = 0; i < points.ids.length; i++) {
    if (!layers.has(points.kinds[i])) continue;
    const dx = at[2 * i] - x, dy = at[2 * i + 1] - y;
    let distance = dx * dx + dy * dy;
    // A chosen image is drawn over the others and larger: on its mark it is the one that is meant.
    if (points.kinds[i] === "p" && distance < SIZE * SIZE) distance -= SIZE * SIZE;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

function pick(index) {
  if (index < 0 || index === picked) return;
  picked = index;
  draw();
  tell(index);
}

function tell(index) {
  const task = points.ids[index], kind = points.kinds[index], place = points.place[index];
  const image = document.createElement("img");
  image.src = map.dataset.thumbnails + task;
  image.alt = `Image of task ${task}`;
  image.addEventListener("error", () => image.remove());
  const link = document.createElement("a");
  link.href = map.dataset.tasks + task;
  link.textContent = `Task ${task}`;
  link.target = "_blank";
  link.rel = "noopener";
  const tag = document.createElement("span");
  tag.className = "tag";
  tag.textContent = place ? `${NAMES[kind]}, place ${place}` : NAMES[kind];
  const title = document.createElement("p");
  title.append(link, " ", tag);
  const why = document.createElement("p");
  why.textContent = (points.reasons[task] || points.said[kind] || "");
  shown.replaceChildren(image, title, why);
}

function openTask() {
  window.open(map.dataset.tasks + points.ids[picked], "_blank", "noopener");
}

canvas.addEventListener("pointermove", (event) => {
  if (!points || event.pointerType === "touch") return;
  clearTimeout(waiting);
  const index = nearest(event);
  waiting = setTimeout(() => pick(index), HOVER_MS);
});

canvas.addEventListener("pointerleave", () => clearTimeout(waiting));

canvas.addEventListener("click", (event) => {
  if (!points) return;
  const index = nearest(event);
  if (index < 0) return;
  pick(index);
  if (event.pointerType !== "touch") openTask(); // a finger cannot point first: it picks, the link opens
});

canvas.addEventListener("keydown", (event) => {
  if (!points || !places.length) return;
  const last = Math.max(0, Object.keys(points.reasons).length - 1);
  const now = picked >= 0 ? places.indexOf(picked) : -1;
  const steps = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: last };
  if (event.key in steps) {
    event.preventDefault();
    pick(places[Math.min(places.length - 1, Math.max(0, steps[event.key]))]);
  } else if (event.key === "Enter" && picked >= 0) {
    openTask();
  }
});

map.querySelector(".layers").addEventListener("change", () => { if (points) draw(); });

for (const link of map.querySelectorAll(".chosen a")) {
  for (const name of ["focus", "mouseenter"]) {
    link.addEventListener(name, () => { if (points) pick(byTask.get(Number(link.dataset.task)) ?? -1); });
  }
}

start();
