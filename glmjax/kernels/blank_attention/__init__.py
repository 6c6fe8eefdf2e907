"""Attention where query q sees the keys k_start[q] <= k < k_end[q]."""
