"""Experiences: on disk (`store`), as bytes (`codec`), nearest by their keys (`index`)."""
