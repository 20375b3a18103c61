"""Recipe for LoquaciousSet."""
