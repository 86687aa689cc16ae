// Shows the value of the point that is nearest to the pointer, or that the arrow keys have reached.
const tip = document.getElementById("tip");
function points(chart) {
  return [...chart.querySelectorAll("[data-tip]")].filter((point) => point.getClientRects().length);
}
function middle(point) {
  const box = point.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}
function show(point) {
  document.querySelectorAll(".near").forEach((other) => other.classList.remove("near"));
  tip.hidden = !point;
  if (!point) return;
  point.classList.add("near");
  tip.textContent = point.dataset.tip;
  const [x, y] = middle(point), half = tip.offsetWidth / 2 + 8;
  tip.style.left = `${Math.max(half, Math.min(document.documentElement.clientWidth - half, x))}px`;
  tip.style.top = `${y < 60 ? y + 42 : y - 12}px`;
}
function nearest(chart, event) {
  const far = (point) => Math.hypot(middle(point)[0] - event.clientX, middle(point)[1] - event.clientY);
  const found = points(chart).map((point) => [far(point), point]).sort((a, b) => a[0] - b[0])[0];
  return found && found[0] < 32 ? found[1] : null;
}
for (const chart of document.querySelectorAll("svg.chart")) {
  let at = -1;
  for (const kind of ["pointermove", "pointerdown"]) chart.addEventListener(kind, (event) => show(nearest(chart, event)));
  for (const kind of ["pointerleave", "blur"]) chart.addEventListener(kind, () => show(null));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = points(chart);
    if (event.key === "Escape") show(null);
    if (!step || !all.length) return;
    at = (at + step + all.length) % all.length;
    show(all[at]);
    event.preventDefault();
  });
}
addEventListener("scroll", () => show(null), { passive: true });
