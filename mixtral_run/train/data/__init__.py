"""Files of any format to examples, token ids, packing, order of samples; `data check`."""
