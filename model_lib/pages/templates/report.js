"use strict";
{% include "words.js" %}
(() => {
  const gallery = document.getElementById("gallery");
  const sort = document.getElementById("sort");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const cards = Array.from(gallery.children, (element, index) => ({
    element,
    index,
    cider: Number(element.dataset.cider),
    gain: Number(element.dataset.gain ?? 0),
    text: Array.from(element.querySelectorAll(".searched"), (text) => text.textContent).join("\n").toLowerCase(),
  }));

  function order() {
    const [key, direction] = sort.value.split(" ");
    const sign = direction === "up" ? 1 : -1;
    gallery.append(
      ...cards
        .toSorted((a, b) => sign * (a[key] - b[key]) || a.index - b.index)
        .map((card) => card.element),
    );
  }

  function select() {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const card of cards) {
      const matches = words.every((word) => card.text.includes(word));
      card.element.hidden = !matches;
      shown += matches;
    }
    count.textContent = `${shown} of ${cards.length} shown`;
    document.getElementById("none").hidden = shown > 0;
  }

  showMaps(gallery);
  sort.addEventListener("change", order);
  filter.addEventListener("input", select);
  const controls = document.getElementById("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  order(); // a browser may restore an earlier choice
  select();
})();
