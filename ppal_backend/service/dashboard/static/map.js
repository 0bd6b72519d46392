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
let lasso = []; // x, y of the line that is being drawn
let dragged = false;
const view = { zoom: 1, scale: 1, centre: [0, 0], middle: [0, 0] };
const small = new Map(); // images that are near enough to be seen, by task
const byClass = document.getElementById("by-class"), onlyClass = document.getElementById("only-class");
const NEAREST = 64, NEAR = 4, MOST_THUMBNAILS = 24, THUMBNAIL_PX = 72, LISTED = 100;
const PALETTE = ["#e08a00", "#128fc2", "#e2405a", "#2f9e44", "#9455d3", "#b59a00", "#d6548f", "#0f9b85", "#5c7cda", "#c76a2b"];
const classColours = new Map(); // of the classes that are on the map
const INK = getComputedStyle(map).color;

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
  prepareClasses();
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
  view.scale = Math.min((width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (high - low || 1));
  view.middle = [(left + right) / 2, (low + high) / 2];
  if (view.zoom === 1) view.centre = view.middle;
  position();
}

function position() {
  const scale = view.scale * view.zoom;
  at = new Float32Array(2 * points.ids.length);
  for (let i = 0; i < points.ids.length; i++) {
    at[2 * i] = canvas.clientWidth / 2 + (points.x[i] - view.centre[0]) * scale;
    at[2 * i + 1] = canvas.clientHeight / 2 - (points.y[i] - view.centre[1]) * scale;
  }
  draw();
}

function zoom(factor, x, y) {
  const before = view.scale * view.zoom;
  const right = x - canvas.clientWidth / 2, up = canvas.clientHeight / 2 - y;
  const under = [view.centre[0] + right / before, view.centre[1] + up / before];
  view.zoom = factor ? Math.min(NEAREST, Math.max(1, view.zoom * factor)) : 1;
  const after = view.scale * view.zoom;
  view.centre = view.zoom === 1 ? view.middle : [under[0] - right / after, under[1] - up / after];
  position();
}

function isShown(i, layers) {
  return layers.has(points.kinds[i]) && (onlyClass.value === "" || points.classes[i] === Number(onlyClass.value));
}

function colour(i) {
  if (!byClass.checked) return COLOURS[points.kinds[i]];
  return classColours.get(points.classes[i]) || COLOURS.r;
}

function thumbnails(layers) {
  if (view.zoom < NEAR) return;
  const near = []; // as many as find room, what is next to label first
  const apart = (i) => near.every((j) => Math.abs(at[2 * i] - at[2 * j]) > THUMBNAIL_PX || Math.abs(at[2 * i + 1] - at[2 * j + 1]) > THUMBNAIL_PX);
  for (const i of [...places, ...points.ids.keys()]) {
    const x = at[2 * i], y = at[2 * i + 1];
    const isThere = x >= 0 && y >= 0 && x <= canvas.clientWidth && y <= canvas.clientHeight;
    if (near.length < MOST_THUMBNAILS && isThere && isShown(i, layers) && apart(i)) near.push(i);
  }
  for (const i of near) {
    const task = points.ids[i];
    if (!small.has(task)) {
      const image = new Image();
      image.addEventListener("load", draw);
      image.src = map.dataset.thumbnails + task;
      small.set(task, image);
    }
    const image = small.get(task);
    if (!image.complete || !image.naturalWidth) continue;
    const height = THUMBNAIL_PX * image.naturalHeight / image.naturalWidth;
    pen.drawImage(image, at[2 * i] + 8, at[2 * i + 1] - height / 2, THUMBNAIL_PX, height);
  }
}

function draw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const layers = visible();
  for (const kind of ORDER) {
    if (!layers.has(kind)) continue;
    for (let i = 0; i < points.ids.length; i++) {
      if (points.kinds[i] !== kind || !isShown(i, layers)) continue;
      pen.fillStyle = pen.strokeStyle = colour(i);
      mark(kind, at[2 * i], at[2 * i + 1]);
    }
  }
  thumbnails(layers);
  if (lasso.length > 1) {
    pen.strokeStyle = INK;
    pen.lineWidth = 1.5;
    pen.beginPath();
    for (const [x, y] of lasso) pen.lineTo(x, y);
    pen.stroke();
  }
  if (picked >= 0) {
    pen.strokeStyle = INK;
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
  }
}

function nearest(event) {
  const box = canvas.getBoundingClientRect(), layers = visible();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = REACH * REACH;
  for (let i = 0; i < points.ids.length; i++) {
    if (!isShown(i, layers)) continue;
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
  const more = document.createElement("p");
  if (isToLabel(index)) more.append(moreLike([task]), " ", labelNext([task]));
  shown.replaceChildren(image, title, why, more);
}

function moreLike(tasks) {
  const link = document.createElement("a");
  link.href = `${map.dataset.similar}?${tasks.map((task) => `task=${task}`).join("&")}`;
  link.textContent = "More like this";
  return link;
}

function labelNext(tasks) { // a form as the cards have it: pins are kept by the backend
  const form = document.createElement("form");
  form.method = "post";
  form.action = map.dataset.steer;
  form.className = "steer inline";
  for (const [name, value] of [["token", map.dataset.token], ...tasks.map((task) => ["task", task])]) {
    const field = document.createElement("input");
    [field.type, field.name, field.value] = ["hidden", name, value];
    form.append(field);
  }
  const button = document.createElement("button");
  [button.name, button.value, button.className] = ["do", "first", "quiet"];
  button.textContent = tasks.length === 1 ? "Label next" : `Label these ${tasks.length} next`;
  form.append(button);
  return form;
}

function openTask() {
  window.open(map.dataset.tasks + points.ids[picked], "_blank", "noopener");
}

canvas.addEventListener("pointermove", (event) => {
  if (!points || event.pointerType === "touch") return;
  clearTimeout(waiting);
  if (lasso.length && event.buttons & 1) {
    lasso.push([event.offsetX, event.offsetY]);
    if (lasso.length > 4) draw();
    return;
  }
  const index = nearest(event);
  waiting = setTimeout(() => pick(index), HOVER_MS);
});

canvas.addEventListener("pointerleave", () => clearTimeout(waiting));

canvas.addEventListener("pointerdown", (event) => {
  if (points && event.pointerType !== "touch" && event.button === 0) lasso = [[event.offsetX, event.offsetY]];
});

canvas.addEventListener("pointerup", () => {
  dragged = lasso.length > 4;
  if (dragged) list(lasso);
  lasso = [];
  if (dragged) draw();
});

canvas.addEventListener("wheel", (event) => {
  if (!points || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, event.offsetX, event.offsetY);
}, { passive: false });

function isInside(x, y, line) {
  let inside = false;
  for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
    const [xi, yi] = line[i], [xj, yj] = line[j];
    if (yi > y !== yj > y && x < (xj - xi) * (y - yi) / (yj - yi) + xi) inside = !inside;
  }
  return inside;
}

function isToLabel(i) {
  return points.place[i] > 0 && !"ls".includes(points.kinds[i]); // neither labelled before nor since
}

function list(line) {
  const layers = visible();
  const inside = points.ids.map((_, i) => i).filter((i) => isShown(i, layers) && isInside(at[2 * i], at[2 * i + 1], line));
  inside.sort((a, b) => (points.place[a] || Infinity) - (points.place[b] || Infinity));
  const title = document.createElement("h3");
  title.textContent = `${inside.length} image${inside.length === 1 ? "" : "s"} within the line`;
  const rows = document.createElement("ol");
  for (const i of inside.slice(0, LISTED)) {
    const row = document.createElement("li"), link = document.createElement("a");
    link.href = map.dataset.tasks + points.ids[i];
    link.textContent = `Task ${points.ids[i]}`;
    link.target = "_blank";
    link.rel = "noopener";
    row.append(link, ` ${NAMES[points.kinds[i]]}`);
    rows.append(row);
  }
  const todo = inside.filter(isToLabel).map((i) => points.ids[i]).slice(0, LISTED);
  const steps = document.createElement("p");
  if (todo.length) steps.append(moreLike(todo), " ", labelNext(todo));
  const parts = [title, steps, rows];
  if (inside.length > LISTED) {
    const more = document.createElement("p");
    more.textContent = `and ${inside.length - LISTED} more`;
    parts.push(more);
  }
  map.querySelector(".lassoed").replaceChildren(...parts);
}

function prepareClasses() {
  const key = document.getElementById("map-key");
  const there = [...new Set(points.classes)].filter((c) => c >= 0).sort((a, b) => a - b);
  for (const c of there) {
    onlyClass.add(new Option(points.labels[c], c));
    const row = document.createElement("li");
    classColours.set(c, PALETTE[classColours.size % PALETTE.length]);
    row.style.setProperty("--class", classColours.get(c));
    row.textContent = points.labels[c];
    key.append(row);
  }
  byClass.addEventListener("change", () => { key.hidden = !byClass.checked; draw(); });
  onlyClass.addEventListener("change", draw);
  for (const button of map.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => {
      const [x, y] = picked >= 0 ? [at[2 * picked], at[2 * picked + 1]] : [canvas.clientWidth / 2, canvas.clientHeight / 2];
      zoom(Number(button.dataset.zoom), x, y);
    });
  }
}

canvas.addEventListener("click", (event) => {
  if (!points || dragged) return;
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
