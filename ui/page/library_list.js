// The list is made in Python. A press on a card, or on the button in it, tells which it was, and its
// number: of two that are sent within moments the second may arrive first.
let presses = 0;
element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-id]");
  if (!card) return;
  // Whoever marks text in a card to copy it chooses nothing.
  if (!event.target.closest("button") && !getSelection().isCollapsed) return;
  trigger("select", { id: card.dataset.id, press: ++presses });
  // On a narrow screen what was chosen is shown below the list.
  if (matchMedia("(max-width: 700px)").matches) {
    document.getElementById("library-detail")?.scrollIntoView({ block: "start" });
  }
});
