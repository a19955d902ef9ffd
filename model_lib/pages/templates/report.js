"use strict";
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

  // While a word is pointed at, its attention map darkens the image.
  let lit = null;

  function show(word) {
    if (lit === word) return;
    hide();
    const map = word.closest(".card").querySelector(".map");
    if (!map) return;
    map.src = `data:image/png;base64,${word.dataset.map}`;
    map.hidden = false;
    word.classList.add("lit");
    lit = word;
  }

  function hide() {
    if (!lit) return;
    lit.closest(".card").querySelector(".map").hidden = true;
    lit.classList.remove("lit");
    lit = null;
  }

  const wordAt = (event) => (event.target instanceof Element ? event.target.closest(".word") : null);
  for (const kind of ["pointerover", "focusin", "click"]) {
    gallery.addEventListener(kind, (event) => {
      const word = wordAt(event);
      if (word) show(word);
    });
  }
  gallery.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && wordAt(event)) hide();
  });
  gallery.addEventListener("focusout", hide);
  gallery.addEventListener("keydown", (event) => {
    const word = wordAt(event);
    if (!word) return;
    if (event.key === "Escape") hide();
    const next = { ArrowRight: word.nextElementSibling, ArrowLeft: word.previousElementSibling }[event.key];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });

  sort.addEventListener("change", order);
  filter.addEventListener("input", select);
  const controls = document.getElementById("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  order(); // a browser may restore an earlier choice
  select();
})();
