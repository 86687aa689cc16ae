/* Code and tables that are wider than the page scroll; without a pointer they can be scrolled once they have the focus. */
function letWidePartsHaveTheFocus() {
  for (const part of document.querySelectorAll(".highlight pre, .table-wrapper, .output pre, .cell_output")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
addEventListener("load", letWidePartsHaveTheFocus);
addEventListener("resize", letWidePartsHaveTheFocus);

/* Sphinx gives the captions of the table of contents the role of headings, and no level. */
addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll(".caption[role=heading]:not([aria-level])")) caption.ariaLevel = "2";
});
