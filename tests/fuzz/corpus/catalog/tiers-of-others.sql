UPDATE tier SET uuid = number || 'x'
