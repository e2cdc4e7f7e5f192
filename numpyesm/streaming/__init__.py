"""Any number of sequences through the model: packed by length, long ones window by window, results one by one."""
