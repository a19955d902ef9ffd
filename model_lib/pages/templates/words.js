function showMaps(root) {
  // While a word is pointed at, its attention map lies on the image.
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
    root.addEventListener(kind, (event) => {
      const word = wordAt(event);
      if (word) show(word);
    });
  }
  root.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && wordAt(event)) hide();
  });
  root.addEventListener("focusout", hide);
  root.addEventListener("keydown", (event) => {
    const word = wordAt(event);
    if (!word) return;
    if (event.key === "Escape") hide();
    const next = { ArrowRight: word.nextElementSibling, ArrowLeft: word.previousElementSibling }[event.key];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
}
