"""Learned layouts: fit `runtime.core.learned_layout.LayoutModel` to a cohort."""
