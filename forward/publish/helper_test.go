package publish
func helper(string) {}
