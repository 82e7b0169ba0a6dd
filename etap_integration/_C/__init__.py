"""Built parts land here: the host module `_host`, the operator library `libetap_mla.so` and its report `ptxas.json`."""
