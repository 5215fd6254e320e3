"""Tasks on the frozen codec: fine-tuning, evaluation on real streams, reports."""
