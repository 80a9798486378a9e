"""One experiment per file, each a module-level `experiment`; `packforcing ... --config NAME` finds them by name."""
