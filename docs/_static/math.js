// TeX between \( \) and \[ \] becomes mathematics.
document.querySelectorAll(".math").forEach(part => renderMathInElement(part, {throwOnError: false}));
